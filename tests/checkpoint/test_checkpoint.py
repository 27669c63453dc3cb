"""Opening a checkpoint: complete, whole files, of known formats."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import load_quantized
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.errors import CheckpointError

from copies import DOWN, LLAMA, UP, Tensors, drop, edited, expected, logits_of, set_quantization, sharded
from paths import FIXTURES

BROKEN: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "two layers lack tensors": (
        drop("up_proj.qweight", "down_proj.scales"),
        [f"{UP}.qweight", f"{DOWN}.scales", "lacks 2 tensors"],
    ),
    "a layer lacks zeros": (drop("up_proj.qzeros"), [f"{UP}.qzeros"]),
    "nothing is quantized": (
        drop(".qweight", ".qzeros", ".g_idx", ".scales"),
        ["holds no tensor named NAME.qweight"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_incomplete_checkpoint_is_refused_and_what_lacks_is_named(case: str, tmp_path: Path) -> None:
    change, needles = BROKEN[case]
    with pytest.raises(CheckpointError) as caught:
        load_quantized(edited(LLAMA, tmp_path / "x", change))
    for needle in [*needles, str(tmp_path)]:
        assert needle in str(caught.value)


BROKEN_DESCRIPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bits that no one packs": ({"bits": 5}, ["bits is 5", "2, 3, 4, 8"]),
    "bits that contradict the shapes": (
        {"bits": 8},
        [f"{DOWN}.qweight has shape [12, 64]", "bits=8", "[24, 64]"],
    ),
    "a group size that contradicts the shapes": (
        {"group_size": 64},
        [f"{DOWN}.scales has shape [3, 64]", "[2, 64]"],
    ),
    "a group size of zero": ({"group_size": 0}, ["group_size is 0"]),
    "another method": ({"quant_method": "awq"}, ["quant_method is 'awq'"]),
    "another format": (
        {"checkpoint_format": "marlin", "format": "marlin"},
        ["checkpoint_format is 'marlin'"],
    ),
    "the planar format": ({"checkpoint_format": "gptq_p", "format": None}, ["checkpoint_format is 'gptq_p'"]),
    "two formats": ({"checkpoint_format": "gptq"}, ["disagree", "'gptq' and 'gptq_v2'"]),
    "words of another width": ({"pack_dtype": "int64"}, ["pack_dtype is 'int64'"]),
    "a rule that is no regular expression": (
        {"dynamic": {"(": {"bits": 4}}},
        ["'('", "not a regular expression"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_DESCRIPTIONS)
def test_descriptions_that_cannot_be_right_are_refused(case: str, tmp_path: Path) -> None:
    values, needles = BROKEN_DESCRIPTIONS[case]
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: set_quantization(c, **values))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(folder)
    for needle in needles:
        assert needle in str(caught.value)


def test_a_rule_that_would_backtrack_for_ever_is_matched_at_once(tmp_path: Path) -> None:
    rules = {f"-:({'.*a' * 9})+(a+)+!": {}}
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: set_quantization(c, dynamic=rules))
    assert len(load_quantized(folder).model.layers) == 1


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1], ids=lambda n: f"first {n} bytes")
def test_truncated_weights_are_refused(keep: int, tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* truncated or corrupt"):
        load_quantized(folder)


def test_weights_with_a_garbled_header_are_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[20:40] = b"?" * 20
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* truncated or corrupt"):
        load_quantized(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        load_quantized(tmp_path / "nowhere")


def test_a_missing_shard_is_refused_and_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors does not exist"):
        load_quantized(folder)


def test_a_shard_without_a_promised_tensor_is_refused_and_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.promised"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors lacks model\.promised"):
        load_quantized(folder)


def test_group_indices_that_are_not_stored_follow_from_the_group_size_and_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edited(LLAMA, tmp_path / "x", drop(".g_idx"))
    with caplog.at_level(logging.WARNING, logger="gptq_plugin"):
        model = load_quantized(folder, dtype=torch.float32)
    assert "stores no g_idx for model.layers.0" in caplog.text
    reference = expected(LLAMA)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


def test_shards_named_by_an_index_are_all_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    reference = expected(LLAMA)
    model = load_quantized(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, reference), reference["logits"], atol=2e-4, rtol=0)


def test_files_that_disagree_about_the_format_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gptqmodel-w4g32", tmp_path / "x")
    beside = tmp_path / "x" / "quantize_config.json"
    content = json.loads(beside.read_text())
    beside.write_text(json.dumps({**content, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}))
    with pytest.raises(CheckpointError, match=r"config\.json has the format 'gptq' and quantize_config\.json has"):
        load_quantized(tmp_path / "x")


def test_act_order_is_told_by_the_groups_and_not_by_the_description() -> None:
    for name, act_order in (("gptqmodel-w4g32-desc-act", True), ("autogptq-w4g32-desc-act-static-groups", False)):
        checkpoint = Checkpoint.open(FIXTURES / name)
        assert {checkpoint.scheme(layer).desc_act for layer in checkpoint.layers} == {act_order}, name
        assert all(layer.desc_act for layer in checkpoint.layers.values()), name


def test_float_tensors_are_all_but_the_layers_and_the_largest_gives_their_dtype(tmp_path: Path) -> None:
    def widened(state: Tensors) -> None:
        state["model.norm.weight"] = state["model.norm.weight"].float()

    checkpoint = Checkpoint.open(edited(LLAMA, tmp_path / "x", widened))
    assert "model.norm.weight" in checkpoint.float_names and f"{DOWN}.g_idx" not in checkpoint.float_names
    assert len(checkpoint.float_names) + 4 * len(checkpoint.layers) == len(checkpoint.tensors)
    assert checkpoint.float_dtype == torch.float16  # of the embeddings
    assert torch.equal(checkpoint.lazy("model.norm.weight")[:], checkpoint.read("model.norm.weight"))


def test_a_layer_is_read_in_the_dtype_and_onto_the_device_asked_for() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "gptqmodel-qwen2-bias-w4g32")
    name = "model.layers.0.self_attn.q_proj"
    layer, stored = checkpoint.read_layer(name, dtype=torch.float64), checkpoint.read(f"{name}.bias")
    assert layer.bias.dtype == torch.float64 and layer.scales.dtype == torch.float16
    assert checkpoint.read_layer(name).bias.dtype == stored.dtype
    assert checkpoint.read_layer(name, device="meta").qweight.is_meta


def test_a_second_description_is_none_or_is_read(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    assert Checkpoint.open(folder).quantize_config["bits"] == 4
    (folder / "quantize_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json cannot be read as JSON"):
        Checkpoint.open(folder)
    (folder / "quantize_config.json").unlink()
    assert Checkpoint.open(folder).quantize_config == {}
