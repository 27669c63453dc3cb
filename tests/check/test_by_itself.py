"""Damage of a layer that shows without its float weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.check.by_itself import layer_findings
from gptq_plugin.check.lint import lint
from gptq_plugin.clients.inventory import LayerEntry
from gptq_plugin.gptq.solver import round_to_nearest
from gptq_plugin.layers.packing import pack_weight, pack_zeros, unpack_weight, unpack_zeros
from gptq_plugin.layers.qlinear import QuantLinear

from damage import (
    LAYER,
    one_channel_in_another_group,
    reversed_groups,
    without,
    zeros_off,
)

ALONE = {
    "zeros + 1": (zeros_off, "promises zeros of 8, and most others are 9, as in a gptq_v2 file labelled"),
    "zeros of one layer": (lambda tensors, bits: zeros_off(tensors, bits, only=LAYER), f"{LAYER}: sym=True promises"),
    "groups reversed": (
        reversed_groups,
        "g_idx puts channels into other groups than i // group_size, as only desc_act",
    ),
    "one channel": (one_channel_in_another_group, "g_idx puts 33 channels into group"),
    "no zeros": (without("qzeros"), "lacks 7 tensors"),
    "one weight missing": (without("qweight", LAYER), f"{LAYER}.qweight"),
    "NaN": (lambda tensors, bits: tensors[f"{LAYER}.scales"].fill_(float("nan")), "NaN"),
    "scales not written": (
        lambda tensors, bits: tensors[f"{LAYER}.scales"].zero_(),
        f"{LAYER}.scales is 0 for weights",
    ),
    "a scale negated": (lambda tensors, bits: tensors[f"{LAYER}.scales"][1].neg_(), f"{LAYER}.scales holds negative"),
}


@pytest.mark.parametrize("damage", ALONE)
def test_damage_shows_by_the_checkpoints_own_description(damage: str, damaged: Callable[..., Path]) -> None:
    change, words = ALONE[damage]
    found = lint(damaged("4 bits symmetric", change))
    assert any(words in error for error in found.errors), found.findings


def test_groups_of_other_sizes_show_where_act_order_may_put_channels_anywhere(damaged: Callable[..., Path]) -> None:
    found = lint(damaged("4 bits act-order", one_channel_in_another_group))
    assert any("g_idx puts 33 channels into group" in error for error in found.errors), found.errors


def test_what_a_single_layer_shows_is_a_warning_or_an_error_by_its_weight_for_the_numbers() -> None:
    """A layer made by hand: 40 inputs at 3 bits do not fill their last word."""
    torch.manual_seed(0)
    weight = round_to_nearest(torch.randn(64, 40), QuantizeConfig(bits=3, group_size=8, sym=False))
    layer = QuantLinear.from_quantized(weight)
    entry = LayerEntry("x", 3, 8, 40, 64, sym=False, act_order=False)

    def found(checkpoint_format: str = "gptq_v2", **changed: torch.Tensor) -> list[tuple[str, str]]:
        one = copy.deepcopy(layer)
        for name, value in changed.items():
            setattr(one, name, value)
        return [(f.level, f.message) for f in layer_findings(entry, one, checkpoint_format)]

    assert not found()
    scales = layer.scales.clone()
    scales[0, 0] = 0
    assert found(scales=scales)[0] == ("warning", "some scales are 0: their groups are all zeros")
    scales[0, 0] = 2000 * layer.scales.median()
    ((level, message),) = found(scales=scales)
    assert level == "warning" and "more than 1000 times" in message
    codes = unpack_weight(layer.qweight, 3, 40)
    codes[0, :8] = unpack_zeros(layer.qzeros, 3, 64)[0, 0]
    assert not found(scales=scales, qweight=pack_weight(codes, 3))  # any scale fits a group of zeros
    used = layer.qweight.clone()
    used[-1, 5] |= 1 << 30  # the stream ends at bit 40 * 3 % 32 = 24 of the last word
    assert [message for _, message in found(qweight=used)] == [
        "the bits after the last code are not zero: another packing, or damage"
    ]
    codes = torch.zeros(64, 40, dtype=torch.uint8)
    ((level, message),) = found(qweight=pack_weight(codes, 3))
    assert level == "warning" and "every code is 0: a layer of zeros or of one constant" in message
    zeros = unpack_zeros(layer.qzeros, 3, 64)
    zeros[0, 0] = 0
    assert [level for level, _ in found("gptq", qzeros=pack_zeros(zeros, 3))] == ["warning"]
    assert not found("gptq_v2", qzeros=pack_zeros(zeros, 3))


@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
@pytest.mark.parametrize("sym", [True, False])
def test_a_layer_of_zeros_or_of_one_constant_is_no_damage(value: float, sym: bool) -> None:
    weight = round_to_nearest(torch.full((64, 40), value), QuantizeConfig(bits=4, group_size=8, sym=sym))
    entry = LayerEntry("x", 4, 8, 40, 64, sym=sym, act_order=False)
    found = list(layer_findings(entry, QuantLinear.from_quantized(weight), "gptq_v2"))
    assert [finding.level for finding in found] == ["warning"]
