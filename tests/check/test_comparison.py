"""A layer beside its float weight: what rounding leaves alone, and what damage moves."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.check import comparison
from gptq_plugin.check.comparison import Comparison, compare, verdict
from gptq_plugin.gptq.solver import round_to_nearest, solve
from gptq_plugin.layers.packing import pack_weight, pack_zeros, unpack_weight, unpack_zeros
from gptq_plugin.layers.qlinear import QuantLinear

OUT, IN = 72, 96
FOUR = QuantizeConfig(bits=4, group_size=32, sym=False, checkpoint_format="gptq_v2")


def layer_of(config: QuantizeConfig, weight: torch.Tensor) -> QuantLinear:
    return QuantLinear.from_quantized(round_to_nearest(weight, config))


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) + 0.2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_rounding_to_nearest_is_sound_and_its_errors_are_what_they_are(
    bits: int, sym: bool, weight: torch.Tensor
) -> None:
    config = dataclasses.replace(FOUR, bits=bits, sym=sym)
    layer = layer_of(config, weight)
    found = compare(layer, weight, config, ratios=(1.0,))
    assert found.error == pytest.approx(float((weight - layer.dequantize()).norm() / weight.norm()), rel=1e-4)
    assert found.over_nearest == pytest.approx(1, abs=1e-4)
    assert abs(found.shift) < 0.1 and found.off_grid == found.rounded == 0
    assert not verdict(found, bits)


def test_the_result_does_not_depend_on_the_rows_in_memory(
    weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(FOUR, weight)
    whole = dataclasses.astuple(compare(layer, weight, FOUR, ratios=(1.0,)))
    monkeypatch.setattr(comparison, "_PART", 5 * IN)  # 72 rows in parts of 5
    assert dataclasses.astuple(compare(layer, weight, FOUR, ratios=(1.0,))) == pytest.approx(whole)


def test_zeros_off_by_one_shift_by_one_step(weight: torch.Tensor) -> None:
    layer = layer_of(FOUR, weight)
    zeros = unpack_zeros(layer.qzeros, 4, OUT)
    layer.qzeros = pack_zeros(zeros + 1, 4)
    found = compare(layer, weight, FOUR)
    assert found.shift == pytest.approx(1, abs=0.05)
    assert "shifted down by about 1 of a step" in " ".join(verdict(found, 4))


def test_codes_that_make_up_for_a_clipped_outlier_are_no_zeros_off_by_one() -> None:
    """Inputs that are never negative: what a row's large weight lacks, its others can give."""
    torch.manual_seed(0)
    weight = torch.randn(256, 96) * (1 + 29 * (torch.arange(96) == 5))
    hessian = torch.randn(600, 96).relu()
    hessian = hessian.T @ hessian / 600
    config = QuantizeConfig(bits=4, group_size=32)
    layer = QuantLinear.from_quantized(solve(weight, hessian, config).weight)
    assert not verdict(compare(layer, weight, config, config.clip_ratios), 4)
    layer.qzeros = pack_zeros(unpack_zeros(layer.qzeros, 4, 256) + (torch.arange(3) == 1)[:, None], 4)
    (only,) = verdict(compare(layer, weight, config, config.clip_ratios), 4)
    assert "some groups are shifted" in only


def test_scales_that_grew_show_in_the_gain_and_off_the_grid(weight: torch.Tensor) -> None:
    layer = layer_of(FOUR, weight)
    layer.scales = (layer.scales.float() * 1.05).half()
    known, unknown = compare(layer, weight, FOUR, ratios=(1.0,)), compare(layer, weight, FOUR)
    assert known.off_grid > 0.9 and "scales are not those" in " ".join(verdict(known, 4))
    assert math.isnan(unknown.off_grid) and unknown.gain > 1.03
    assert "weights are larger than the float ones" in " ".join(verdict(unknown, 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bit", [10, 13])
def test_one_scale_with_a_flipped_bit_in_its_exponent_shows_at_every_width(
    bits: int, bit: int, weight: torch.Tensor
) -> None:
    config = dataclasses.replace(FOUR, bits=bits)
    layer = layer_of(config, weight)
    layer.scales.view(torch.int16)[1, 5] ^= 1 << bit
    (only,) = verdict(compare(layer, weight, config, ratios=(1.0, 0.95)), bits)
    assert "some scales (1) are far from" in only or "correlation below" in only


def test_scales_rounded_to_bfloat16_are_told_only_where_the_file_has_such(weight: torch.Tensor) -> None:
    layer = layer_of(FOUR, weight)
    layer.scales = layer.scales.bfloat16().half()
    found = compare(layer, weight.bfloat16(), FOUR, ratios=(1.0,))
    assert found.rounded > 0.05
    found = dataclasses.replace(found, off_grid=0.0)  # as of a float model that was itself rounded
    assert "rounded to bfloat16" in " ".join(verdict(found, 4, bfloat16_scales=True))
    assert not verdict(found, 4)


def test_channels_in_other_groups_fit_those_groups_better(weight: torch.Tensor) -> None:
    scale = torch.tensor([0.1, 1.0, 10.0]).repeat_interleave(32)
    layer = layer_of(FOUR, weight * scale)
    wrong = copy.deepcopy(layer)
    wrong.g_idx = layer.g_idx.flip(0)
    assert compare(layer, weight * scale, FOUR).misplaced < 0.05
    assert compare(wrong, weight * scale, FOUR).misplaced > 0.6


def test_a_layer_of_another_model_has_no_correlation_and_nothing_else_is_told(weight: torch.Tensor) -> None:
    layer = layer_of(FOUR, weight)
    layer.qweight = pack_weight(unpack_weight(layer.qweight, 4, IN).roll(1, 1), 4)
    (only,) = verdict(compare(layer, weight - 0.2, FOUR), 4)
    assert "does not hold the float model's weights" in only


SOUND = Comparison(0.1, 1.2, 0.99, 0.01, 0.0, 0.99, float("nan"), float("nan"), 0, 0.0)


@pytest.mark.parametrize(
    "changed,bits,words",
    [
        ({}, 4, None),
        ({"correlation": 0.39}, 4, "does not hold"),
        ({"shift": -0.9, "shifted_groups": 0.9}, 4, "shifted up"),
        ({"shift": -0.9}, 4, "a few groups are shifted by many steps"),
        ({"shift": 0.39}, 4, None),
        ({"shifted_groups": 0.02}, 4, "some groups are shifted"),
        ({"gain": 1.03}, 2, "weights are larger"),
        ({"gain": 0.9}, 4, "weights are smaller"),
        ({"gain": 0.9}, 3, None),  # clipping shrinks weights of few bits
        ({"misplaced": 0.6}, 3, "g_idx is wrong"),
        ({"misplaced": 0.6}, 2, None),
        ({"over_nearest": 6.0}, 4, "more than 5 times"),
        ({"off_grid": 0.02, "rounded": 0.02, "stray": 3}, 4, "scales are not those"),
        ({"off_grid": 0.009, "rounded": 0.009, "stray": 3}, 4, "some scales (3) are far"),
    ],
)
def test_each_limit_has_its_sentence(changed: dict[str, float], bits: int, words: str | None) -> None:
    found = verdict(dataclasses.replace(SOUND, **changed), bits)
    assert (len(found), words is None or words in found[0]) == (words is not None, True), found


def test_a_comparison_does_not_depend_on_the_default_dtype(request):
    torch.manual_seed(0)
    weight, config = torch.randn(32, 64) * 0.02, QuantizeConfig(bits=4, group_size=32)
    layer = QuantLinear.from_quantized(round_to_nearest(weight, config), None, torch.float32)
    usual = compare(layer, weight, config, (1.0, 0.95))
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    assert compare(layer, weight, config, (1.0, 0.95)) == usual and usual.off_grid == 0


CONSTANT = {
    "zeros": lambda weight: torch.zeros_like(weight),
    "one constant": lambda weight: torch.full_like(weight, 0.03),
    "one negative constant": lambda weight: torch.full_like(weight, -0.03),
    "a constant in every row": lambda weight: weight[:, :1].expand_as(weight).contiguous(),
    "half of zeros": lambda weight: torch.cat([weight[:36] * 0, weight[36:]]),
    "one weight": lambda weight: torch.zeros_like(weight).index_put_(
        (torch.tensor(3), torch.tensor(5)), torch.ones(())
    ),
    "its largest twice as large": lambda weight: weight.clamp(-0.1, 0.1),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("kind", CONSTANT)
def test_a_layer_of_zeros_or_constants_is_sound(kind: str, sym: bool, bits: int, weight: torch.Tensor) -> None:
    """A symmetric grid has no point for a positive constant; that is its rounding, not a shift."""
    config = dataclasses.replace(FOUR, bits=bits, sym=sym)
    unusual = CONSTANT[kind](weight)
    layer = layer_of(config, unusual)
    for ratios in ((), (1.0,)):
        assert not verdict(compare(layer, unusual, config, ratios), bits)


def test_a_layer_of_zeros_that_holds_something_else_is_told(weight: torch.Tensor) -> None:
    for one, other in ((weight, weight * 0), (weight * 0, weight)):
        (only,) = verdict(compare(layer_of(FOUR, one), other, FOUR), 4)
        assert "does not hold the float model's weights" in only
