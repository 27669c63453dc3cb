"""Our layers through transformers' own `from_pretrained`, on checkpoints of other tools (tests/fixtures)."""

from __future__ import annotations

import json
import logging
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

from gptq_plugin import QuantizeConfig, load_quantized
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.reserve import Place
from gptq_plugin.errors import CheckpointError
from gptq_plugin.export.export import export_model
from gptq_plugin.hf.quantizer import GPTQPluginConfig, quantized_config, register
from gptq_plugin.layers.qlinear import QuantLinear

from paths import FIXTURES

NAMES = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir() and not p.name.startswith("llmcompressor"))
LLAMA = "gptqmodel-w4g32-v2"
DOWN = "model.layers.0.mlp.down_proj"


def loaded(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=quantized_config(folder), **kwargs)


def edited(target: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with tensors put in or (None) left out; a dot in a name is written as two underscores."""
    shutil.copytree(FIXTURES / LLAMA, target)
    state = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    save_file(state, target / "model.safetensors")
    return target


def logits_of(model: Any, name: str) -> torch.Tensor:
    reference = load_file(FIXTURES / f"{name}.expected.safetensors")
    with torch.no_grad():
        return model(input_ids=reference["input_ids"]).logits[0, -len(reference["logits"]) :].float()


def expected(name: str) -> torch.Tensor:
    return load_file(FIXTURES / f"{name}.expected.safetensors")["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_computes_what_the_independent_reader_computes(name: str) -> None:
    model = loaded(FIXTURES / name, dtype=torch.float32)
    assert not model.training
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    torch.testing.assert_close(logits_of(model, name), expected(name), atol=2e-4, rtol=0)


def test_generation_continues_as_the_independent_reader_does() -> None:
    reference = load_file(FIXTURES / f"{LLAMA}.expected.safetensors")
    ids, greedy = reference["input_ids"], reference["greedy"]
    model = loaded(FIXTURES / LLAMA, dtype=torch.float32)
    new = {"max_new_tokens": len(greedy), "min_new_tokens": len(greedy)}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **new)
    assert torch.equal(out[0, ids.shape[1] :], greedy)


def test_importing_registers_nothing_and_transformers_own_quantizers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    mappings = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    for mapping in mappings:
        monkeypatch.delitem(mapping, "gptq_plugin", raising=False)
    monkeypatch.delitem(sys.modules, "gptq_plugin.hf.quantizer")  # runpy runs it again, beside the one in use
    before = [dict(mapping) for mapping in mappings]
    module = runpy.run_module("gptq_plugin.hf.quantizer")
    assert [dict(mapping) for mapping in mappings] == before
    module["register"]()
    module["register"]()
    for old, new in zip(before, mappings, strict=True):
        assert set(new) - set(old) == {"gptq_plugin"}
        assert all(new[key] is old[key] for key in old)


def test_a_name_taken_by_another_package_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "gptq_plugin", object)
    with pytest.raises(ValueError, match="already registered"):
        register()


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"model": "cpu", "lm_head": "cpu", DOWN: "cpu"}])
def test_a_device_map_is_followed(device_map: Any) -> None:
    pytest.importorskip("accelerate")
    model = loaded(FIXTURES / LLAMA, dtype=torch.float32, device_map=device_map)
    torch.testing.assert_close(logits_of(model, LLAMA), expected(LLAMA), atol=2e-4, rtol=0)


def test_transformers_reports_no_missing_and_no_unexpected_tensors(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging as hf_logging

    hf_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            loaded(FIXTURES / "gptqmodel-mixed-bits")
    finally:
        hf_logging.disable_propagation()
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["gptqmodel-w4g32-asym", "autogptq-w4g32-asym-desc-act"])
def test_save_pretrained_writes_a_gptq_v2_checkpoint_that_every_way_loads(name: str, tmp_path: Path) -> None:
    """v1 on disk, true zeros in memory."""
    model = loaded(FIXTURES / name, dtype=torch.float32)
    assert not any(module.training for module in model.modules())
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["checkpoint_format"]) == ("gptq", "gptq_v2")
    for again in (loaded(tmp_path), load_quantized(tmp_path)):
        assert torch.equal(logits_of(again, name), logits_of(model, name))


def test_the_dtype_is_that_of_what_is_not_quantized_and_scales_stay_float16() -> None:
    model = loaded(FIXTURES / "gptqmodel-qwen2-bias-w4g32", dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert (model.dtype, layer.bias.dtype, layer.scales.dtype) == (torch.bfloat16, torch.bfloat16, torch.float16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_named_by_an_index_are_all_read(tmp_path: Path) -> None:
    loaded(FIXTURES / LLAMA, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits_of(loaded(tmp_path), LLAMA), expected(LLAMA), atol=2e-4, rtol=0)


def test_a_file_of_another_name_is_the_one_that_the_description_names(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / LLAMA, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").rename(tmp_path / "x" / "gptq_model-4bit-32g.safetensors")
    shutil.copy(tmp_path / "x" / "gptq_model-4bit-32g.safetensors", tmp_path / "x" / "adapter_model.safetensors")
    for file in (tmp_path / "x" / "config.json", tmp_path / "x" / "quantize_config.json"):
        content = json.loads(file.read_text())
        content.get("quantization_config", content)["model_file_base_name"] = "gptq_model-4bit-32g"
        file.write_text(json.dumps(content))
    model = loaded(tmp_path / "x", dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, LLAMA), expected(LLAMA), atol=2e-4, rtol=0)


def test_the_base_model_of_a_causal_one_loads_too() -> None:
    folder = FIXTURES / LLAMA
    whole = loaded(folder, dtype=torch.float32)
    base = AutoModel.from_pretrained(folder, config=quantized_config(folder), dtype=torch.float32)
    ids = torch.tensor([[5, 9, 17]])
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def tiny_mixtral() -> Any:
    """A model whose experts are joined into one tensor when loaded."""
    from transformers import MixtralConfig, MixtralForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=1, **heads)
    )


def tiny_llava() -> Any:
    """A model whose tensors have other names on the hub than in memory."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    text = LlamaConfig(**sizes, vocab_size=96)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=90))


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_llava])
def test_models_whose_tensors_transformers_renames_or_joins_load_too(make: Any, rtn: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = QuantizeConfig(group_size=16, checkpoint_format="gptq_v2")
    model = rtn(make(), config)
    export_model(model, tmp_path / "out", config)
    again = type(model).from_pretrained(tmp_path / "out", config=quantized_config(tmp_path / "out"))
    ids = torch.tensor([[5, 9, 17]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_gradients_reach_adapters_below_quantized_layers() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(loaded(FIXTURES / LLAMA, dtype=torch.float32), LoraConfig(target_modules=["lm_head"]))
    embeddings = model.get_input_embeddings()
    embeddings.requires_grad_()
    ids = torch.tensor([[5, 9, 17]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert embeddings.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", f"{DOWN}.qzeros"])
def test_a_missing_tensor_is_refused_by_name_and_not_made_up(name: str, tmp_path: Path) -> None:
    folder = edited(tmp_path / "x", **{name.replace(".", "__"): None})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        loaded(folder)


def test_a_bias_that_the_model_has_and_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gptqmodel-qwen2-bias-w4g32", tmp_path / "x")
    state = load_file(tmp_path / "x" / "model.safetensors")
    del state["model.layers.0.self_attn.q_proj.bias"]
    save_file(state, tmp_path / "x" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is missing"):
        loaded(tmp_path / "x")


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = edited(tmp_path / "x", **{f"{DOWN}.scales".replace(".", "__"): torch.ones(2, 64, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match=r"down_proj\.scales has shape \[2, 64\]"):
        loaded(folder)


def test_a_layer_of_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    config = quantized_config(FIXTURES / LLAMA)
    config.intermediate_size = 128
    with pytest.raises(CheckpointError, match="the model's Linear has 128"):
        AutoModelForCausalLM.from_pretrained(FIXTURES / LLAMA, config=config)


def test_a_float_model_is_not_quantized_by_it(tmp_path: Path) -> None:
    register()
    config = quantized_config(FIXTURES / LLAMA)
    del config.quantization_config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GPTQPluginConfig())


def test_offloading_is_refused_since_quantized_layers_would_not_be(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(CheckpointError, match="quantized layers are not offloaded"):
        loaded(FIXTURES / LLAMA, device_map=device_map, offload_folder=tmp_path)


def test_a_device_map_counts_what_the_quantized_layers_will_take() -> None:
    checkpoint = Checkpoint.open(FIXTURES / LLAMA)
    for name, layer in checkpoint.layers.items():
        read = checkpoint.read_layer(name).buffers()
        assert Place(layer).room.numel() == sum(buffer.numel() * buffer.element_size() for buffer in read)


@pytest.mark.parametrize("count", [10**6, 10**30, 1e308])
def test_more_layers_than_the_files_can_hold_are_refused_before_any_is_built(count: float, tmp_path: Path) -> None:
    folder = edited(tmp_path / "x")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_hidden_layers": count}))
    with pytest.raises(CheckpointError, match=r"x/config\.json: num_hidden_layers is 1.* files hold"):
        quantized_config(folder)


def test_a_damaged_folder_is_refused_before_transformers_reads_it(tmp_path: Path) -> None:
    folder = edited(tmp_path / "x")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"x/config\.json cannot be read as JSON"):
        quantized_config(folder)


def test_a_tensor_in_two_files_is_refused_as_transformers_would_take_the_last(tmp_path: Path) -> None:
    folder = edited(tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model-1.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"] * 0}, folder / "model-2.safetensors")
    weights = dict.fromkeys(state, "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    assert loaded(folder) is not None  # nobody reads the second file
    again = {"model.norm.weight": state["model.norm.weight"] * 0, "other": torch.ones(1)}
    save_file(again, folder / "model-2.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**weights, "other": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index\.json names one file for model\.norm\.weight"):
        loaded(folder)
