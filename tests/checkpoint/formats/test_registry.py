"""Formats by name and by what a description states; a new one is its file, its name and its entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq_plugin import QuantizeConfig, load_quantized
from gptq_plugin import config as config_module
from gptq_plugin.check.lint import lint
from gptq_plugin.checkpoint.formats.format import Contents, QuantizedLayer, RawRows, Read, Shapes
from gptq_plugin.checkpoint.formats.gptq import GPTQ
from gptq_plugin.checkpoint.formats.registry import FORMATS, stated_format
from gptq_plugin.config import CHECKPOINT_FORMATS
from gptq_plugin.errors import CheckpointError
from gptq_plugin.export import convert as convert_module
from gptq_plugin.export.convert import convert
from gptq_plugin.export.export import export_model
from gptq_plugin.options import fields

from exports import logits
from models import tiny_llama

FILE = Path("config.json")


def test_there_is_a_format_for_every_name_that_the_option_takes() -> None:
    assert tuple(FORMATS) == CHECKPOINT_FORMATS
    assert all(FORMATS[name].name == name for name in FORMATS)


def test_a_description_without_a_method_is_gptqs() -> None:
    assert stated_format({"bits": 4}, FILE) is FORMATS["gptq"]
    assert stated_format({"quant_method": "gptq", "format": "gptq_v2"}, FILE) is FORMATS["gptq_v2"]


def test_other_methods_and_formats_are_refused_with_those_that_are_read() -> None:
    with pytest.raises(CheckpointError, match="quant_method is 'awq'; this package reads 'gptq' and 'compressed-tens"):
        stated_format({"quant_method": "awq"}, FILE)
    with pytest.raises(
        CheckpointError,
        match="checkpoint_format is 'marlin'; this package reads 'gptq' and 'gptq_v2', and quant_method 'compressed-te",
    ):
        stated_format({"checkpoint_format": "marlin"}, FILE)
    with pytest.raises(CheckpointError, match="checkpoint_format is 'compressed-tensors'"):
        stated_format({"checkpoint_format": "compressed-tensors"}, FILE)


NAMES = {"qweight": "words", "qzeros": "zeros", "scales": "steps", "g_idx": "group_of"}


class Toy(GPTQ):
    """GPTQ's tensors under other names, described by one line."""

    quant_method = "toy"
    marks = ("words", "steps")
    needed = ("words", "zeros", "steps")
    suffixes = ("words", "zeros", "steps", "group_of", "bias")
    codes, scales, zeros, g_idx = "words", "steps", "zeros", "group_of"
    in_memory = ()
    repeated = ()

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], bits: int, read: Read) -> tuple[int, int]:
        return super().sizes({old: shapes[new] for old, new in NAMES.items()}, bits, read)

    def expected(self, in_features: int, out_features: int, groups: int, bits: int, sym: bool) -> Shapes:
        expected = super().expected(in_features, out_features, groups, bits, sym)
        return {NAMES.get(suffix, suffix): shape for suffix, shape in expected.items()}

    def to_file(self, tensors: Mapping[str, Tensor], bits: int, sym: bool) -> dict[str, Tensor]:
        return {NAMES.get(suffix, suffix): tensor for suffix, tensor in super().to_file(tensors, bits, sym).items()}

    def from_file(self, read: Read, layer: QuantizedLayer) -> dict[str, Tensor]:
        return super().from_file(lambda suffix: read(NAMES.get(suffix, suffix)), layer)

    def first_rows(self, read: Read, layer: QuantizedLayer, rows: int) -> RawRows:
        return super().first_rows(lambda suffix: read(NAMES.get(suffix, suffix)), layer, rows)

    def stated(self, quantization: Mapping[str, Any], source: Path) -> str:
        return self.name

    def describe(self, contents: Contents, config: QuantizeConfig) -> dict[str, Any]:
        return {"quant_method": "toy", "bits": config.bits, "group_size": config.group_size}

    def loaded(self, quantization: Mapping[str, Any], contents: Callable[[], Contents]) -> dict[str, Any]:
        return {**super().loaded(quantization, contents), "quant_method": "gptq"}


def test_a_new_format_is_exported_checked_loaded_and_converted(
    rtn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "toy", Toy("toy", 0))
    names = (*CHECKPOINT_FORMATS, "toy")
    monkeypatch.setattr(convert_module, "CHECKPOINT_FORMATS", names)
    monkeypatch.setitem(config_module._KINDS, "checkpoint_format", fields.one_of(*names))
    config = QuantizeConfig(group_size=32, checkpoint_format="toy")
    model = rtn(tiny_llama(), config)
    folder = export_model(model, tmp_path / "toy", config)
    assert "model.layers.0.mlp.up_proj.words" in load_file(folder / "model.safetensors")
    assert torch.equal(logits(load_quantized(folder)), logits(model))
    found = lint(folder)
    assert not found.findings and found.facts["format"] == "toy"
    back = convert(convert(folder, tmp_path / "gptq", "gptq"), tmp_path / "back", "toy")
    assert torch.equal(logits(load_quantized(back)), logits(model))
