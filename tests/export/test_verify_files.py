"""The files hold the model: every tensor is compared, and rows of every layer are decoded from single bits."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_plugin import QuantizeConfig
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.formats.format import QuantizedLayer, Read
from gptq_plugin.checkpoint.formats.gptq import GPTQ
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.errors import ExportError
from gptq_plugin.export import verify_files
from gptq_plugin.export.export import export_model
from gptq_plugin.export.verify_files import checksums, decoded_rows, verify, verify_same
from gptq_plugin.layers.qlinear import QuantLinear

from models import Plain, tiny_llama
from paths import FIXTURES

CONFIG = QuantizeConfig(group_size=16)
READABLE = sorted(path.name for path in FIXTURES.glob("*-w*") if path.is_dir() and not path.name.startswith("optimum"))


@pytest.fixture
def model(rtn: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return rtn(Plain(), CONFIG)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    return export_model(model, tmp_path / "out", CONFIG)


def layers_of(model: Any) -> dict[str, QuantLinear]:
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)}


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return folder


@pytest.mark.parametrize("name", READABLE)
def test_rows_decoded_bit_by_bit_are_the_layers_first_weights(name: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    for layer in checkpoint.layers:
        weight = checkpoint.read_layer(layer).dequantize()
        for rows in (5, 10_000):  # neither fills a word; more than there are
            assert torch.equal(decoded_rows(checkpoint, layer, rows), weight[:rows].float())


def test_the_models_own_files_pass(model: Any, folder: Path) -> None:
    verify(folder, layers_of(model), model.state_dict())


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx", "bias"])
def test_a_tensor_of_a_layer_that_differs_is_named(suffix: str, model: Any, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[f"inner.0.{suffix}"]
        if suffix == "g_idx":  # its groups stay as large, but the description promises that they are contiguous
            tensor[[0, -1]] = tensor[[-1, 0]]
        else:
            tensor[-1] += 1

    contradicted = {
        "qzeros": r".*inner\.0: sym=True promises",
        "g_idx": r".*inner\.0\.g_idx puts channels into other groups",
    }
    what = contradicted.get(suffix, rf"{suffix} of inner\.0 differs")
    with pytest.raises(ExportError, match=f"(?s)does not read back: {what}"):
        verify(rewritten(folder, change), layers_of(model), model.state_dict())


def test_what_was_written_is_known_where_a_layer_maps_the_file_itself(model: Any, folder: Path) -> None:
    """The file and the layer change alike."""
    layers = layers_of(model)
    written = {name: checksums(dict(layer.named_buffers())) for name, layer in layers.items()}
    verify(folder, layers, {}, written=written)
    rewritten(folder, lambda tensors: tensors["inner.0.scales"].mul_(2))
    layers["inner.0"].scales.mul_(2)
    verify(folder, layers, {})
    with pytest.raises(ExportError, match=r"scales of inner\.0 differs from what was written"):
        verify(folder, layers, {}, written=written)


@pytest.mark.parametrize("number", [0, 1, 23, 24, 27])
def test_every_layer_is_decoded_and_the_one_that_is_wrong_is_named(
    number: int, rtn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more layers than are decoded at a time, and several shapes of them."""
    model = rtn(tiny_llama(num_hidden_layers=4), CONFIG)
    folder = export_model(model, tmp_path / "out", CONFIG)
    wrong = list(Checkpoint.open(folder).layers)[number]
    rows_of = verify_files._raw_rows

    def read(checkpoint: Checkpoint, name: str, *options: Any) -> Any:
        found = rows_of(checkpoint, name, *options)
        return dataclasses.replace(found, scales=2 * found.scales) if name == wrong else found

    monkeypatch.setattr(verify_files, "_raw_rows", read)
    with pytest.raises(ExportError, match=f"back: {re.escape(wrong)} decodes to other weights than the model's"):
        verify(folder, layers_of(model), {})


def test_layers_of_one_shape_are_decoded_each_with_its_groups(rtn: Callable[..., Any], tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16, desc_act=True)
    model = rtn(tiny_llama(num_hidden_layers=2), config, permuted=True)
    assert export_model(model, tmp_path / "out", config).is_dir()


def test_a_bias_that_is_in_one_of_them_only_differs(model: Any, folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.pop("inner.0.bias"))
    with pytest.raises(ExportError, match=r"bias of inner\.0 differs"):
        verify(folder, layers_of(model), model.state_dict())


def test_a_layer_that_is_not_in_the_files_is_named(model: Any, folder: Path) -> None:
    more = {**layers_of(model), "other": copy.deepcopy(model.inner[0])}
    with pytest.raises(ExportError, match="does not read back: other is not in it"):
        verify(folder, more, model.state_dict())


def test_float_tensors_are_compared_with_their_dtype_and_those_of_other_names_are_not(model: Any, folder: Path) -> None:
    state = model.state_dict()
    verify(folder, layers_of(model), {**state, "of another name": torch.ones(3)})
    for other in (state["shift"] + 1, state["shift"].double(), state["shift"][:-1]):
        with pytest.raises(ExportError, match="shift differs from the model's"):
            verify(folder, layers_of(model), {**state, "shift": other})


def test_large_tensors_are_compared_to_their_last_piece(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_files, "_COMPARED", 1000)  # bytes: some rows of the embedding at a time
    verify(folder, layers_of(model), model.state_dict())
    rewritten(folder, lambda tensors: tensors["embed.weight"][-1].add_(1))
    with pytest.raises(ExportError, match=r"embed\.weight differs"):
        verify(folder, layers_of(model), model.state_dict())


class RowsSwapped(GPTQ):
    """Writes two output channels in each other's place and reads them back so: its own inverse, and wrong."""

    channels = (31, 40)

    def to_file(self, tensors: Mapping[str, Tensor], bits: int, sym: bool) -> dict[str, Tensor]:
        return super().to_file({**tensors, "qweight": self._swapped(tensors["qweight"])}, bits, sym)

    def from_file(self, read: Read, layer: QuantizedLayer) -> dict[str, Tensor]:
        tensors = super().from_file(read, layer)
        return {**tensors, "qweight": self._swapped(tensors["qweight"])}

    def _swapped(self, qweight: Tensor) -> Tensor:
        one, other = self.channels
        swapped = qweight.clone()
        swapped[:, [one, other]] = qweight[:, [other, one]]
        return swapped


class ZerosAsTheyAre(GPTQ):
    """Stores no zero less one, and reads none so."""

    def to_file(self, tensors: Mapping[str, Tensor], bits: int, sym: bool) -> dict[str, Tensor]:
        return dict(tensors)

    def from_file(self, read: Read, layer: QuantizedLayer) -> dict[str, Tensor]:
        return {**super().from_file(read, layer), "qzeros": read("qzeros")}


@pytest.mark.parametrize("wrong", [RowsSwapped, ZerosAsTheyAre])
def test_a_format_that_reads_back_what_it_wrote_wrongly_is_found_by_decoding(
    wrong: type[GPTQ], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 32nd channel is the last of those decoded."""
    monkeypatch.setitem(FORMATS, "gptq", wrong("gptq", 1))
    with pytest.raises(ExportError, match=r"inner\.0 decodes to other weights than the model's"):
        export_model(model, tmp_path / "out", CONFIG)
    assert not any(tmp_path.iterdir())


def test_copies_in_two_formats_are_the_same_until_a_tensor_differs(
    model: Any, folder: Path, rtn: Callable[..., Any], tmp_path: Path
) -> None:
    source = Checkpoint.open(
        export_model(model, tmp_path / "v2", QuantizeConfig(group_size=16, checkpoint_format="gptq_v2"))
    )
    verify_same(source, folder)
    original = load_file(folder / "model.safetensors")

    def broken(change: Callable[[dict[str, Tensor]], Any]) -> Path:
        save_file(original, folder / "model.safetensors")
        return rewritten(folder, change)

    with pytest.raises(ExportError, match=r"the copy does not read back: inner\.0 differs \(scales\)"):
        verify_same(source, broken(lambda tensors: tensors["inner.0.scales"].mul_(2)))
    with pytest.raises(ExportError, match="the copy does not read back: shift differs"):
        verify_same(source, broken(lambda tensors: tensors["shift"].add_(1)))
    with pytest.raises(ExportError, match="other layers or other tensors"):
        verify_same(source, broken(lambda tensors: tensors.pop("shift")))
    with pytest.raises(ExportError, match="the copy does not read back: .* lacks"):
        verify_same(source, broken(lambda tensors: tensors.pop("inner.0.scales")))


def test_nan_is_compared_by_its_bits() -> None:
    values = torch.tensor([1.0, float("nan"), float("-inf")])
    assert verify_files._equal(values, values.clone())
    assert not verify_files._equal(values, torch.tensor([1.0, -float("nan"), float("-inf")]))
    assert not verify_files._equal(torch.zeros(1), -torch.zeros(1))


def test_parts_of_larger_tensors_are_compared_wherever_they_begin() -> None:
    part = torch.arange(64, dtype=torch.float16)[2:34]
    assert verify_files._equal(part.clone(), part) and verify_files._equal(part, part.clone())
    assert not verify_files._equal(part.clone().add_(1), part)


@pytest.mark.parametrize("asymmetric", ["k", "v", "k|v", "q", "q|k"])
def test_layers_of_one_shape_are_decoded_each_as_its_file_says(asymmetric: str, rtn: Any, tmp_path: Path) -> None:
    rule = {rf".*\.({asymmetric})_proj": {"sym": False}}
    config = QuantizeConfig(group_size=16, checkpoint_format="compressed-tensors", dynamic=rule)
    torch.manual_seed(0)
    model = rtn(tiny_llama(num_hidden_layers=2, num_key_value_heads=4, num_attention_heads=4), config)
    assert export_model(model, tmp_path / "out", config).is_dir()
