"""Training a model with quantized layers as if they were float ones: one warning that teaches, and only then."""

from __future__ import annotations

import copy
import gc
import io
import time
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.layers.float_rest import FloatRest

from models import tiny_llama

IDS = torch.arange(24).view(2, 12)


def quantized_llama() -> Any:
    model = tiny_llama()
    QuantizeModule(group_size=32).round_to_nearest(model)
    return model.train()


def step(model: nn.Module) -> list[str]:
    """The warnings of a training step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(input_ids=IDS, labels=IDS).loss.backward()
    return [str(one.message) for one in caught if "quantized" in str(one.message)]


class Lora(nn.Module):
    """An adapter on a layer, as anybody may write it."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


# --- it warns -----------------------------------------------------------------------------------------------


def test_training_what_the_quantization_left_is_warned_of_once_with_the_way_out() -> None:
    model = quantized_llama()
    floats = [name for name, p in model.named_parameters() if p.requires_grad]
    (text,) = step(model)
    assert f"only {len(floats)} float parameters" in text and floats[0] in text
    assert "LlamaForCausalLM" in text and "load the float weights into a new model" in text and "model.eval()" in text
    assert step(model) == [] and step(copy.deepcopy(model)) == []
    assert len(step(quantized_llama())) == 1  # another model


def test_a_calibrated_a_loaded_and_a_copied_model_warn_too(tmp_path: Any) -> None:
    model = tiny_llama()
    quantizer = QuantizeModule(group_size=32, nsamples=16)
    quantizer.quantize(model, [{"input_ids": IDS}] * 8, export_dir=tmp_path / "out")
    copied = copy.deepcopy(model)
    loaded = load_quantized(tmp_path / "out")
    for one in (model, copied, loaded):
        assert len(step(one.train())) == 1


def test_a_plain_module_in_a_larger_one_warns_whoever_calls_its_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    QuantizeModule(group_size=32).round_to_nearest(net)
    net.train()
    with pytest.warns(UserWarning, match="only 2 float parameters do \\(0.weight, 0.bias\\)"):
        net[1](net[0](torch.randn(4, 32))).sum().backward()


# --- it does not --------------------------------------------------------------------------------------------


def test_evaluation_does_not_warn_in_any_mode() -> None:
    model = quantized_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(input_ids=IDS)
        with torch.inference_mode():
            model(input_ids=IDS)
        model.eval()
        model(input_ids=IDS)
        model.generate(IDS, max_new_tokens=2, pad_token_id=0)
    assert len(step(model.train())) == 1  # and has not used up the warning


@pytest.mark.parametrize("frozen", [True, False])
def test_adapters_of_ones_own_on_quantized_layers_do_not_warn(frozen: bool) -> None:
    model = quantized_llama()
    if frozen:
        model.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    attention.q_proj = Lora(attention.q_proj)
    assert step(model) == [] and attention.q_proj.up.weight.grad is not None


def test_peft_adapters_on_a_loaded_model_do_not_warn(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model = quantized_llama()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    config._register_custom_module({QuantLinear: _PeftLora})
    adapted = peft.get_peft_model(model, config).train()
    assert step(adapted) == []


class _PeftLora(nn.Module):
    """The least that PEFT asks of a layer: ours is unknown to it."""

    def __new__(cls, base: QuantLinear, adapter_name: str, **kwargs: Any) -> Any:
        from peft.tuners.lora.layer import LoraLayer

        class Layer(nn.Module, LoraLayer):
            def __init__(self) -> None:
                nn.Module.__init__(self)
                LoraLayer.__init__(self, base)
                self.lora_A[adapter_name] = nn.Linear(base.in_features, 2, bias=False)
                self.lora_B[adapter_name] = nn.Linear(2, base.out_features, bias=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.base_layer(x) + self.lora_B[adapter_name](self.lora_A[adapter_name](x))

        return Layer()


def test_a_frozen_model_under_a_trained_head_does_not_warn() -> None:
    model = quantized_llama().requires_grad_(False)
    head = nn.Linear(128, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(model(input_ids=IDS).logits).sum().backward()


def test_compiled_code_neither_warns_nor_has_more_breaks_in_its_graph() -> None:
    net, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64)), torch.randn(4, 32)
    QuantizeModule(group_size=32).round_to_nearest(net)
    net.train()

    def breaks() -> int:
        torch._dynamo.reset()
        return torch._dynamo.explain(net)(x).graph_break_count

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            net(x)  # the layer prepares itself
        with_check = breaks()
        torch.compile(net, backend="eager")(x).sum().backward()
    assert net[0].weight.grad is not None
    assert not [one for one in caught if "quantized" in str(one.message)]
    net[1].float_rest = None
    assert breaks() == with_check


# --- it costs nothing ---------------------------------------------------------------------------------------


def test_the_check_keeps_no_model_alive_and_is_not_saved() -> None:
    model = quantized_llama()
    layer, gone = model.model.layers[0].self_attn.q_proj, weakref.ref(model)
    assert not any("float_rest" in name for name in model.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    assert len(file.getvalue()) < 100_000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded(torch.randn(1, 64)).shape == (1, 64)
    alone, again = copy.deepcopy(layer), copy.deepcopy(loaded)
    del model
    gc.collect()
    assert gone() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (layer, loaded, alone, again):
            one.train()(torch.randn(1, 64, requires_grad=True)).sum().backward()


def test_after_the_first_forward_the_check_is_one_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized_llama()
    step(model)
    walked = []
    monkeypatch.setattr(type(model), "named_parameters", lambda self, *_, **__: walked.append(1) or iter(()))
    rest = model.model.layers[0].self_attn.q_proj.float_rest
    assert isinstance(rest, FloatRest)
    started = time.perf_counter()
    for _ in range(1000):
        rest.check_training()
    assert not walked and time.perf_counter() - started < 0.05
