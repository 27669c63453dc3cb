"""The float model's weights, one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptq_plugin.check.float_weights import FloatWeights
from gptq_plugin.errors import CheckpointError


def folder(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path / "model.safetensors")
    return path


def test_a_name_may_lack_the_base_models_prefix_or_have_one_more(tmp_path: Path) -> None:
    floats = FloatWeights(folder(tmp_path, **{"layers.0.up.weight": torch.ones(2, 3), "model.norm": torch.ones(3)}))
    assert floats.tensor("model.layers.0.up.weight").shape == (2, 3)
    assert floats.tensor("norm").shape == (3,)
    assert floats.tensor("other") is None


def test_a_name_that_fits_several_tensors_is_none_of_them_unless_it_is_one_exactly(tmp_path: Path) -> None:
    one, other = torch.zeros(2), torch.ones(2)
    floats = FloatWeights(folder(tmp_path, **{"vision.norm": one, "text.norm": other}))
    assert floats.tensor("norm") is None
    assert torch.equal(floats.tensor("text.norm"), other)


def test_a_name_that_fits_several_tensors_is_the_one_by_the_prefix_of_most_others(tmp_path: Path) -> None:
    theirs = {name: torch.full((2, 3), float(i)) for i, name in enumerate(["net.head", "net.aux.head", "net.lost"])}
    floats = FloatWeights(
        folder(tmp_path, **{f"{k}.weight": t for k, t in theirs.items()}, **{"net.aux.head.bias": torch.ones(2)})
    )
    floats.expect(["head.weight", "aux.head.weight"])
    assert torch.equal(floats.weight("head", (2, 3)), theirs["net.head"])
    assert torch.equal(floats.weight("aux.head", (2, 3)), theirs["net.aux.head"])
    assert floats.bias("head") is None and torch.equal(floats.bias("aux.head"), torch.ones(2))
    assert floats.unread() == {"net.lost.weight": "lost.weight"}


def test_a_transposed_matrix_that_is_not_square_tells_that_all_are(tmp_path: Path) -> None:
    square = torch.arange(9.0).view(3, 3)
    floats = FloatWeights(folder(tmp_path, **{"a.weight": square, "b.weight": torch.ones(2, 3)}))
    assert torch.equal(floats.weight("a", (3, 3)), square)
    assert floats.weight("b", (3, 2)).shape == (3, 2)
    assert torch.equal(floats.weight("a", (3, 3)), square.T)
    assert floats.weight("b", (4, 3)) is None and floats.weight("c", (3, 3)) is None


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save_file({f"t{number}": torch.full((1,), float(number))}, tmp_path / f"model-{number}.safetensors")
    names = {f"t{number}": f"model-{number}.safetensors" for number in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    floats = FloatWeights(tmp_path)
    assert float(floats.tensor("t2")) == 2 and floats.tensor("t3") is None


def test_a_folder_without_weights_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        FloatWeights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="the float model cannot be read: .*no safetensors file"):
        FloatWeights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="the float model cannot be read: .*truncated or corrupt"):
        FloatWeights(tmp_path)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_a_weight_that_holds_no_floats_is_refused_with_the_dtypes_that_can_be_compared(
    kind: torch.dtype, tmp_path: Path
) -> None:
    floats = FloatWeights(folder(tmp_path, **{"model.up.weight": torch.ones(2, 3).to(kind)}))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors of .*: model\.up\.weight is .*one of F16, BF16, F32"
    ):
        floats.weight("up", (2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_since_it_compares_with_nothing(value: float, tmp_path: Path) -> None:
    floats = FloatWeights(folder(tmp_path, **{"up.weight": torch.full((2, 3), value)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors of .*: up\.weight holds NaN or infinity"):
        floats.weight("up", (2, 3))
