"""Checkpoints in compressed-tensors' format that llm-compressor wrote (tests/fixtures/llmcompressor-*)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_plugin.kernels.reference import unpack
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from gptq_plugin import load_quantized
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.errors import CheckpointError
from gptq_plugin.hf.quantizer import quantized_config
from gptq_plugin.layers.qlinear import QuantLinear

from paths import FIXTURES

NAMES = sorted(path.name for path in FIXTURES.glob("llmcompressor-*") if path.is_dir())
DOWN = "model.layers.0.mlp.down_proj"


def loaded(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=quantized_config(folder), **kwargs)


def error_of(model: Any, name: str) -> float:
    """The largest difference to the logits that compressed-tensors' own unpacking gives."""
    reference = load_file(FIXTURES / f"{name}.expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=reference["input_ids"]).logits[0, -len(reference["logits"]) :]
    return float((logits - reference["logits"]).abs().max())


def edited(name: str, target: Path, change: Any) -> Path:
    shutil.copytree(FIXTURES / name, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("load", [load_quantized, loaded])
@pytest.mark.parametrize("name", NAMES)
def test_llm_compressors_checkpoint_computes_what_its_own_reader_computes(name: str, load: Any) -> None:
    model = load(FIXTURES / name, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == len(Checkpoint.open(FIXTURES / name).layers) >= 6
    assert error_of(model, name) < 2e-4


def test_the_fixtures_hold_every_width_with_and_without_zeros_and_groups() -> None:
    seen = set()
    for name in NAMES:
        for layer in Checkpoint.open(FIXTURES / name).layers.values():
            seen |= {layer.bits, (layer.bits, layer.sym), "channel" if layer.group_size == -1 else "group"}
    assert seen >= {2, 3, 4, 8, (4, True), (4, False), (3, False), (8, False), "channel", "group"}


@pytest.mark.parametrize("name", ["llmcompressor-w4g32-asym", "llmcompressor-mixed-bits"])
@pytest.mark.parametrize("load", [load_quantized, loaded])
def test_save_pretrained_writes_them_as_gptq_v2(name: str, load: Any, tmp_path: Path) -> None:
    load(FIXTURES / name, dtype=torch.float32).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert error_of(load_quantized(tmp_path), name) < 2e-4
    wanted, found = (Checkpoint.open(folder).layers for folder in (FIXTURES / name, tmp_path))
    assert {n: (x.bits, x.group_size, x.sym) for n, x in found.items()} == {
        n: (x.bits, x.group_size, x.sym) for n, x in wanted.items()
    }


def test_a_base_model_is_described_by_its_own_names() -> None:
    folder = FIXTURES / "llmcompressor-mixed-bits"
    model = AutoModel.from_pretrained(folder, config=quantized_config(folder))
    rules = model.config.quantization_config.to_dict()["dynamic"]
    assert rules == {
        r"-:layers\.\d+\.self_attn\.q_proj$": {},
        r"layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }


def test_a_zero_one_too_high_is_noticed_by_the_logits(tmp_path: Path) -> None:
    name = "llmcompressor-w4g32-asym"
    key = f"{DOWN}.weight_zero_point"
    wrong = edited(name, tmp_path / "x", lambda state: state.update({key: state[key] ^ 0x11111111}))
    assert error_of(load_quantized(wrong, dtype=torch.float32), name) > 0.1


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_tensor_that_is_missing_is_refused_and_named(suffix: str, tmp_path: Path) -> None:
    folder = edited("llmcompressor-w4g32-asym", tmp_path / "x", lambda state: state.pop(f"{DOWN}.{suffix}"))
    for load in (load_quantized, loaded):
        with pytest.raises(CheckpointError, match=rf"down_proj\.{suffix}"):
            load(folder)


def test_three_bits_as_compressed_tensors_packed_them_before_0_18_are_refused(tmp_path: Path) -> None:
    """Ten codes in a word, two bits unused: a stream read as the other would be another model."""

    def repack(state: Any) -> None:
        for key in [key for key in state if key.endswith("weight_packed")]:
            in_features = int(state[key.replace("packed", "shape")][1])
            codes = unpack(state[key].t(), 3, in_features).int()
            codes = torch.cat([codes, codes.new_zeros(-in_features % 10, codes.shape[1])]).view(-1, 10, codes.shape[1])
            shifts = 3 * torch.arange(10, dtype=torch.int32)[:, None]
            state[key] = (codes << shifts).sum(1, dtype=torch.int32).t()

    folder = edited("llmcompressor-w3g32-asym", tmp_path / "x", repack)
    with pytest.raises(CheckpointError, match=r"weight_packed has shape \[64, 7\]"):
        load_quantized(folder)


def test_groups_in_act_order_as_compressed_tensors_wrote_them_before_0_19_are_read(tmp_path: Path) -> None:
    """Made of GPTQModel's act-order checkpoint, of which the independent reader's logits are known."""
    name = "gptqmodel-w4g32-desc-act"
    shutil.copytree(FIXTURES / name, tmp_path / "x")
    (tmp_path / "x" / "quantize_config.json").unlink()
    state = load_file(tmp_path / "x" / "model.safetensors")
    for key in [key for key in state if key.endswith(".qweight")]:
        layer = key.removesuffix(".qweight")
        packed, scales, g_idx = (state.pop(f"{layer}.{suffix}") for suffix in ("qweight", "scales", "g_idx"))
        del state[f"{layer}.qzeros"]  # symmetric
        state[f"{layer}.weight_packed"], state[f"{layer}.weight_scale"] = packed.t(), scales.t()
        state[f"{layer}.weight_shape"] = torch.tensor([packed.shape[1], len(g_idx)])
        state[f"{layer}.weight_g_idx"] = g_idx
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "x" / "model.safetensors")
    content = json.loads((tmp_path / "x" / "config.json").read_text())
    quantization = json.loads((FIXTURES / "llmcompressor-w4g32" / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (tmp_path / "x" / "config.json").write_text(json.dumps({**content, "quantization_config": quantization}))
    assert error_of(load_quantized(tmp_path / "x", dtype=torch.float32), name) < 2e-4
