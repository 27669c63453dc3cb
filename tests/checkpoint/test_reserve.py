"""Room for quantized layers in a model built for float ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import load_quantized
from gptq_plugin.checkpoint import load
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.checkpoint.reserve import Place, in_memory, match, reserve
from gptq_plugin.errors import CheckpointError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules

from copies import DOWN, LLAMA, UP, Tensors, drop, edited, expected, logits_of
from paths import FIXTURES


def float_model(folder: Path) -> Any:
    """The model of a checkpoint's configuration, without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    load.forget_quantization(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["gptqmodel-mixed-bits", "llmcompressor-w8-channel"])
def test_places_stand_where_layers_will_and_take_their_room(name: str) -> None:
    checkpoint, model = Checkpoint.open(FIXTURES / name), float_model(FIXTURES / name)
    names = reserve(checkpoint, model)
    assert names.keys() == checkpoint.layers.keys() == set(names.values())
    for module, stored in names.items():
        place = model.get_submodule(module)
        layer = checkpoint.read_layer(stored)
        assert isinstance(place, Place) and place.room.is_meta
        assert place.room.numel() == sum(b.nbytes for key, b in layer.named_buffers() if key != "bias")
        assert (place.in_features, place.out_features) == (layer.in_features, layer.out_features)
        assert place.weight.shape == (layer.out_features, layer.in_features)


def test_a_layer_whose_weight_the_model_ties_is_refused() -> None:
    checkpoint, model = Checkpoint.open(FIXTURES / LLAMA), float_model(FIXTURES / LLAMA)
    model.all_tied_weights_keys = {f"{DOWN}.weight": "model.embed_tokens.weight"}
    with pytest.raises(CheckpointError, match="the model ties its weight to model.embed_tokens.weight: set tie_word"):
        reserve(checkpoint, model)
    assert isinstance(model.get_submodule(DOWN), torch.nn.Linear)


def test_a_shared_layer_is_read_once_under_its_first_name() -> None:
    checkpoint, model = Checkpoint.open(FIXTURES / LLAMA), float_model(FIXTURES / LLAMA)
    attention = model.model.layers[0].self_attn
    attention.v_proj = attention.k_proj
    names = match(checkpoint, model, lambda name: name)
    (left_out,) = checkpoint.layers.keys() - names.keys()
    assert left_out in ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.k_proj")


def test_the_description_of_what_is_in_memory_is_of_gptq_v2() -> None:
    for name in (LLAMA, "gptqmodel-w4g32", "llmcompressor-mixed-bits"):
        checkpoint, model = Checkpoint.open(FIXTURES / name), float_model(FIXTURES / name)
        names = reserve(checkpoint, model)
        swap_modules(model, {module: checkpoint.read_layer(stored) for module, stored in names.items()})
        found = in_memory(checkpoint, model, names)
        assert (found["quant_method"], found["checkpoint_format"], found["format"]) == ("gptq", "gptq_v2", "gptq_v2")
        for module, stored in names.items():
            assert FORMATS["gptq_v2"].schemes(found)(module).bits == checkpoint.layers[stored].bits


def test_a_layer_that_the_model_does_not_have_is_refused_and_named(tmp_path: Path) -> None:
    def one_more(state: Tensors) -> None:
        state |= {k.replace("layers.0", "layers.7"): v.clone() for k, v in list(state.items()) if "layers.0" in k}

    with pytest.raises(CheckpointError) as caught:
        load_quantized(edited(LLAMA, tmp_path / "x", one_more))
    assert "model.layers.7.mlp.up_proj is quantized in the checkpoint and no module in the model" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_layer_that_lost_its_bias_is_refused(tmp_path: Path) -> None:
    folder = edited("gptqmodel-qwen2-bias-w4g32", tmp_path / "x", drop("q_proj.bias"))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is missing"):
        load_quantized(folder)


def test_a_quantized_layer_of_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.update(intermediate_size=128))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(folder)
    assert f"{DOWN} has 96 inputs and 64 outputs at bits=4; the model's Linear has 128 and 64" in str(caught.value)
    assert f"{UP} has 64 inputs" in str(caught.value)


def test_a_layer_away_from_its_block_sends_its_output_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second device is "meta", from which nothing comes back, so that sending is noted and not done."""
    accelerate = pytest.importorskip("accelerate")
    fill, sent = load.fill, []

    def dispatch_and_fill(checkpoint: Any, model: Any, names: Any) -> None:
        accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu", DOWN: "meta"}, main_device="cpu")
        del model.hf_device_map  # it would say that "cpu" and "meta" are offloading
        fill(checkpoint, model, names)

    def send(value: Any, device: Any, **options: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_meta or str(device) == "meta":
            return accelerate.utils.send_to_device(value, device, **options)
        sent.append(value.shape)
        return torch.zeros(value.shape, dtype=value.dtype)

    monkeypatch.setattr(load, "fill", dispatch_and_fill)
    model = load_quantized(FIXTURES / LLAMA, device_map={"": "cpu"}, dtype=torch.float32)
    assert model.get_submodule(DOWN).qweight.is_meta
    assert not model.get_submodule(UP).qweight.is_meta
    monkeypatch.setattr("accelerate.hooks.send_to_device", send)
    monkeypatch.setattr(QuantLinear, "product", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.long))
    assert sent == [(1, 5, model.config.hidden_size)]


def test_a_hook_that_accelerate_put_on_a_place_moves_to_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for several devices, on the one there is: transformers dispatches before the layers are in their places."""
    accelerate = pytest.importorskip("accelerate")
    fill = load.fill

    def dispatch_and_fill(checkpoint: Any, model: Any, names: Any) -> None:
        where = {"model": "cpu", DOWN: "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(model, where, force_hooks=True)
        assert model.get_submodule(DOWN)._hf_hook is not None
        fill(checkpoint, model, names)

    monkeypatch.setattr(load, "fill", dispatch_and_fill)
    model = load_quantized(FIXTURES / LLAMA, dtype=torch.float32)
    layer = model.get_submodule(DOWN)
    assert isinstance(layer, QuantLinear)
    assert layer._hf_hook.execution_device == "cpu"
    assert layer._hf_hook.io_same_device  # the block adds its own tensors to the output
    assert layer.forward.__wrapped__.__func__ is QuantLinear.forward
    reference = expected(LLAMA)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)
