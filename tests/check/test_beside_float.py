"""Damage that shows beside the float model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_plugin import Finish, QuantizeModule
from gptq_plugin.check.lint import lint
from gptq_plugin.export.convert import convert

from damage import (
    LAYER,
    bytes_swapped,
    cast,
    one_group_off,
    reversed_groups,
    rolled,
    scaled,
    zeros_off,
)
from finish_cases import FAST, quantized, rows
from models import Plain

OF_THE_FLOAT_MODEL = {
    "zeros + 1": (zeros_off, "zeros off by one"),
    "zeros - 1": (lambda tensors, bits: zeros_off(tensors, bits, -1), "zeros off by one"),
    "zeros of one layer + 1": (
        lambda tensors, bits: zeros_off(tensors, bits, only=LAYER),
        f"{LAYER}: weights are",
    ),
    "zeros of one group + 1": (one_group_off, f"{LAYER}: some groups are shifted"),
    "bytes of every word swapped": (bytes_swapped, "does not hold the float model's weights"),
    "scales * 1.05": (scaled, "all 7 layers: scales are not those"),
    "scales of one layer * 1.05": (
        lambda tensors, bits: scaled(tensors, bits, LAYER),
        f"{LAYER}: scales are not those",
    ),
    "scales of one layer * 0.97": (
        lambda tensors, bits: scaled(tensors, bits, LAYER, 0.97),
        f"{LAYER}: scales are not",
    ),
    "words of one layer moved": (rolled, "model.layers.0.mlp.down_proj: it does not hold the float model's weights"),
}


@pytest.mark.parametrize(
    "case",
    ["2 bits asymmetric", "3 bits asymmetric", "8 bits asymmetric", "4 bits compressed-tensors"],
)
@pytest.mark.parametrize("damage", OF_THE_FLOAT_MODEL)
def test_damage_shows_beside_the_float_model_at_every_width(
    damage: str, case: str, damaged: Callable[..., Path], float_dir: Path
) -> None:
    change, words = OF_THE_FLOAT_MODEL[damage]
    found = lint(damaged(case, change), float_dir)
    assert any(words in error for error in found.errors), found.findings


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
def test_what_is_not_quantized_must_be_the_float_model_s(
    name: str, damaged: Callable[..., Path], float_dir: Path
) -> None:
    out = damaged("4 bits symmetric", lambda tensors, bits: tensors[name][1:2].add_(0.5))
    (error,) = lint(out, float_dir).errors
    assert error.startswith(f"{name}: not quantized") and "by up to 0.5" in error
    assert not lint(out).errors


def test_what_is_not_quantized_may_be_cast_and_a_name_may_lack_the_base_model_s(
    damaged: Callable[..., Path], float_dir: Path, tmp_path: Path
) -> None:
    """The float model is float32, with digits that bfloat16 has no room for, and saved without its head, and with one
    that the transformers model has not."""
    whole = {key: t for file in float_dir.glob("*.safetensors") for key, t in load_file(file).items()}
    norm = torch.rand(128) + 1 / 3
    floats = {key.removeprefix("model."): t.float() for key, t in whole.items() if key != "lm_head.weight"}
    save_file({**floats, "norm.weight": norm, "value_head.weight": torch.ones(1, 128)}, tmp_path / "model.safetensors")
    out = damaged("4 bits symmetric", lambda tensors, bits: tensors.update({"model.norm.weight": norm.bfloat16()}))
    found = lint(out, tmp_path)
    assert not found.errors
    assert found.facts["compared"].endswith("4 other tensors are equal, 4 of them cast from float32 to bfloat16")
    assert "lm_head.weight: the float model has no tensor" in found.findings[0].message
    save_file({**floats, "norm.weight": norm + 0.01}, tmp_path / "model.safetensors")
    assert any(error.startswith("model.norm.weight: not quantized") for error in lint(out, tmp_path).errors)


def test_biases_of_quantized_layers_are_compared_and_a_bias_of_zeros_may_be_nowhere(
    damaged: Callable[..., Path], float_dir: Path, tmp_path: Path
) -> None:
    def bias(tensors: dict[str, torch.Tensor], bits: int, value: float = 0.0) -> None:
        tensors[f"{LAYER}.bias"] = torch.full((160,), value, dtype=torch.float16)

    out = damaged("4 bits symmetric", bias)
    assert not lint(out, float_dir).findings
    whole = {key: t for file in float_dir.glob("*.safetensors") for key, t in load_file(file).items()}
    save_file({**whole, f"{LAYER}.bias": torch.ones(160)}, tmp_path / "model.safetensors")
    assert [error.startswith(f"{LAYER}.bias: not quantized") for error in lint(out, tmp_path).errors] == [True]
    (tmp_path / "damaged").rename(tmp_path / "before")
    lost = lint(damaged("4 bits symmetric", lambda tensors, bits: None), tmp_path).errors
    assert lost == [f"{LAYER}: the float model has a bias there, and the checkpoint has none: it was lost"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An export of a module that is no transformers model, and its float weights, tied and shared ones twice."""
    folder, model, quantizer = tmp_path_factory.mktemp("plain"), Plain(), QuantizeModule(group_size=16)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    quantizer.round_to_nearest(model)
    return quantizer.export(model, folder / "out"), folder


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("lost", ["embed.", "inner.2.", "window", "shift"])
def test_a_tensor_or_layer_of_a_plain_module_that_was_lost_is_an_error(
    lost: str, prefix: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """Not what lies outside the part of the float model that was exported."""
    whole, floats = plain
    file = tmp_path / "model.safetensors"
    theirs = {f"{prefix}{name}": t for name, t in load_file(floats / "model.safetensors").items()}
    save_file(theirs | ({"other.weight": torch.ones(3)} if prefix else {}), file)
    assert lint(whole, tmp_path).errors == []
    out = Path(shutil.copytree(whole, tmp_path / "damaged"))
    tensors = load_file(whole / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if not name.startswith(lost)}, out / "model.safetensors")
    (error,) = lint(out, tmp_path).errors
    assert prefix + lost in error and error.endswith("not in the checkpoint: lost, or of another model")


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.aux = nn.Linear(32, 64, bias=False), nn.ModuleDict({"head": nn.Linear(32, 64)})


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_layer_is_not_taken_for_one_whose_name_ends_in_its_own(prefix: str, tmp_path: Path) -> None:
    """Experts, here a single weight, that are apart in one of them and together in the other are no loss."""
    model, quantizer, floats = _TwoHeads(), QuantizeModule(group_size=16), tmp_path / "float"
    floats.mkdir()
    theirs = {f"{prefix}{name}": t.clone() for name, t in model.state_dict().items()}
    save_file(theirs, floats / "model.safetensors")
    quantizer.round_to_nearest(model)
    out = quantizer.export(model, tmp_path / "out")
    found = lint(out, floats)
    assert not found.findings and found.facts["compared"].startswith("2 layers")
    weight = theirs.pop(f"{prefix}head.weight")
    save_file({**theirs, f"{prefix}head.both": weight}, floats / "model.safetensors")
    assert not lint(out, floats).errors


def test_a_tied_weight_may_have_another_of_its_names_in_the_float_model(tmp_path: Path) -> None:
    """`safetensors.torch.save_model` keeps the first of them in alphabetical order."""
    model, quantizer = nn.Sequential(nn.Embedding(48, 32), nn.Linear(32, 32)), QuantizeModule(group_size=16)
    model.again, model.scale = model[1], nn.Parameter(torch.ones(7))
    model.last = nn.Linear(32, 48, bias=False)
    model.last.weight = model[0].weight
    kept = {"last.weight": model[0].weight.detach().clone(), "again.weight": model[1].weight.detach().clone()}
    kept |= {"again.bias": model[1].bias.detach().clone(), "scale": model.scale.detach()}
    save_file(kept, tmp_path / "model.safetensors")
    quantizer.round_to_nearest(model)
    found = lint(quantizer.export(model, tmp_path / "out"), tmp_path)
    assert not found.errors and all("so not compared" in finding.message for finding in found.findings)


def test_scales_of_an_unknown_recipe_are_held_to_the_size_of_the_weights(
    damaged: Callable[..., Path], float_dir: Path
) -> None:
    found = lint(damaged("4 bits natural order", scaled), float_dir)
    assert any("weights are larger than the float ones" in error for error in found.errors), found.findings


def test_a_g_idx_that_is_not_the_codes_own_shows_beside_the_float_model(
    damaged: Callable[..., Path], float_dir: Path
) -> None:
    out = damaged("4 bits act-order", reversed_groups)
    assert not lint(out).errors
    assert any("g_idx is wrong" in error for error in lint(out, float_dir).errors)


def test_scales_in_bfloat16_are_reported_to_have_moved_weights_where_that_shows(
    damaged: Callable[..., Path], float_dir: Path
) -> None:
    out = damaged("4 bits symmetric", cast(torch.bfloat16))
    assert not lint(out).errors and "bfloat16" in lint(out).findings[0].message
    assert any("rounded to bfloat16" in error for error in lint(out, float_dir).errors)


def test_a_float_model_without_its_layers_is_reported_and_compares_nothing(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    save_file({"other.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    found = lint(exported("4 bits symmetric"), tmp_path)
    assert found.facts["compared"].startswith("0 layers")
    assert "has no weight of that name and shape" in found.findings[0].message
    assert "has no tensor of that name and shape" in found.findings[1].message


def test_a_constant_layer_is_unusual_alone_and_sound_beside_the_float_model(
    damaged: Callable[..., Path], float_dir: Path, tmp_path: Path
) -> None:
    floats = {key: t for file in float_dir.glob("*.safetensors") for key, t in load_file(file).items()}
    floats[f"{LAYER}.weight"] = torch.zeros_like(floats[f"{LAYER}.weight"])
    save_file(floats, tmp_path / "model.safetensors")

    def all_zeros(tensors: dict[str, torch.Tensor], bits: int) -> None:
        tensors[f"{LAYER}.qweight"].fill_(-2004318072)  # 0x88888888: the zero of 4 bits, eight times
        tensors[f"{LAYER}.scales"].fill_(1)

    out = damaged("4 bits symmetric", all_zeros)
    (alone,) = [finding for finding in lint(out).findings if "every code is 8" in finding.message]
    assert alone.level == "warning"
    assert not lint(out, tmp_path).errors and "every code" not in str(lint(out, tmp_path).findings)
    assert f"{LAYER}: it does not hold the float model's weights" in str(lint(out, float_dir).errors)


def test_weights_below_the_smallest_scale_are_told_as_such_and_not_as_damage(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[1].weight.mul_(1e-7)
    (tmp_path / "float").mkdir()
    save_file(model.state_dict(), tmp_path / "float/model.safetensors")
    quantizer = QuantizeModule(group_size=16)
    quantizer.round_to_nearest(model)
    quantizer.export(model, tmp_path / "out")
    (found,) = lint(tmp_path / "out", tmp_path / "float").findings
    assert (found.level, found.message.partition(": ")[0]) == ("warning", "1") and "loses most of them" in found.message


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An export whose scales and norms were trained, and its float model."""
    folder = tmp_path_factory.mktemp("finished")
    model, twin, quantizer = quantized(bits=4)
    record = quantizer.finish(model, twin, rows(), Finish(**FAST))
    assert record.kept
    twin.save_pretrained(folder / "float")
    return quantizer.export(model, folder / "out"), folder / "float"


@pytest.mark.parametrize("converted", [False, True])
def test_scales_and_norms_that_a_finish_trained_are_no_damage(
    converted: bool, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, float_dir = finished
    if converted:
        folder = convert(folder, tmp_path / "converted", "compressed-tensors")
    found = lint(folder, float_dir)
    assert not found.errors
    assert re.search(r"; 5 of norms were trained, and moved by up to \d", found.facts["compared"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: scaled(tensors, 4), "scales were changed"),
        (lambda tensors: tensors["model.embed_tokens.weight"].mul_(1.1), "not the float model's values"),
    ],
)
def test_damage_shows_in_a_finished_export_too(
    change: Callable[..., None], words: str, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, float_dir = shutil.copytree(finished[0], tmp_path / "damaged"), finished[1]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert any(words in error for error in lint(folder, float_dir).errors)
