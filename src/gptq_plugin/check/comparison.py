"""Compares a quantized layer with its float weight, by statistics that damage moves and quantization does not.

A quantizer's own errors are large: rounding, clipped ranges, and GPTQ's updates of later columns. Their size alone does
not tell them from damage. On average, however, they shift nothing, keep the scale, and are as large as rounding to the
same grid. Weights are read a part of a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import grid
from gptq_plugin.layers.packing import unpack_weight, unpack_zeros
from gptq_plugin.layers.qlinear import QuantLinear

_PART = 2**23  # weights in memory at a time
_DECODED, _LEAST_ROWS, _MOST_ROWS = 2**28, 64, 512  # weights decoded to find channels in wrong groups

# Limits. Beside each: what a third of the layers of 21 quantizations of pycode-29m had (2, 3, 4 and 8 bits, symmetric
# and not, groups of 32, 64 and a row, every order of columns, with clip_ratios and without), then those damaged so.
# Shifts are of five such quantizations, at 2 to 4 bits.
_CORRELATION = 0.4  # at least 0.74; channels moved: at most 0.03
_AS_NEAREST = 0.1  # of a step, of a group's mean: where Q is N, what W has beyond it is no shift
_SHIFT = 0.4  # at most 0.03; zeros off by one: at least 0.93
_SHIFTED_GROUPS = 0.01  # at most 0.0003; zeros of a group off by one: that group
_FEW = 0.1  # zeros off by one: at least 0.9
_OFF_GRID = 0.01  # none; scales times 1.05: at least 0.08
_STRAY = 0.1  # beside all scales that a group can have; undamaged ones at most 0.001
_ROUNDED = 0.05  # none; scales rounded to bfloat16: at least 0.09
_GAIN = 1.02  # at most 1.000; scales times 1.05: at least 1.038 at 4 and 8 bits and 3 bits without clip_ratios
_GAIN_LOW = 0.96  # at 4 and 8 bits at least 0.988; at 2 and 3 bits clipping takes up to 0.13
_MISPLACED = 0.5  # at 3 bits and more at most 0.03; g_idx reversed: at least 0.82
_OVER_NEAREST = 5  # at most 1.67; channels moved at 4 bits: at least 12


@dataclass(frozen=True)
class Comparison:
    """Statistics of a layer W, its quantized form Q, with step s and error W − Q, and N, W rounded to Q's grids.

    A symmetric grid has no point for its largest weight, and a clipped one for none beyond it: N lacks those too.

    Attributes:
        error: ‖W − Q‖ / ‖W‖.
        over_nearest: ‖W − Q‖ / ‖W − N‖.
        correlation: Of W and Q: about 0 if rows or columns changed places; NaN if both are all zeros.
        shift: Mean of (W − Q) / s, 0 for groups where Q is N on average: 1 if zeros are off by one.
        shifted_groups: Share of the groups in which that mean exceeds 0.5 in size, less those in which it has the other
            sign: what makes up for a large weight that was clipped goes both ways.
        gain: Σ W·Q / Σ W·W, or / Σ W·N if that is nearer to 1: at most about 1, since errors shrink weights; 1.05 if
            scales are 5 % too large.
        off_grid: Share of the groups whose step quantizing W gives for none of the `ratios`; NaN without ratios.
        rounded: The same without allowance for a float model that was itself rounded to its dtype.
        stray: Number of groups whose step is nowhere near those that quantizing W gives for the `ratios`.
        misplaced: Share of the channels whose codes fit another group's grid better than their own, on sampled rows.
    """

    error: float
    over_nearest: float
    correlation: float
    shift: float
    shifted_groups: float
    gain: float
    off_grid: float
    rounded: float
    stray: int
    misplaced: float


@torch.no_grad()
def compare(layer: QuantLinear, weight: Tensor, config: QuantizeConfig, ratios: Iterable[float] = ()) -> Comparison:
    """Compares a layer on the CPU with its float weight, [out, in].

    Args:
        layer: With true zeros.
        weight: Float, of any dtype.
        config: The layer's grid: sym and checkpoint_format are read.
        ratios: The clip ratios of a group's range, if the tool that wrote the layer is known to derive grids from the
            float weight.
    """
    bits, top = layer.bits, 2**layer.bits - 1
    group = layer.g_idx.long()
    groups = layer.scales.shape[0]
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=groups)
    even = bool((counts == counts[0]).all())
    zeros = unpack_zeros(layer.qzeros, bits, layer.out_features)
    known = torch.tensor(list(ratios), dtype=torch.float32, device="cpu")
    sums = torch.zeros(8, dtype=torch.float64, device="cpu")
    beside = [torch.zeros(3, 0, dtype=torch.bool, device="cpu")]
    rows = max(1, _PART // layer.in_features)
    for start in range(0, layer.out_features, rows):
        part = slice(start, start + rows)
        w = weight[part].float()
        scales, z = layer.scales[:, part].float().T, zeros[:, part].float().T  # [rows, G]
        s, offset = scales[:, group], z[:, group]
        codes = unpack_weight(layer.qweight[:, part].contiguous(), bits, layer.in_features)
        q = codes.float().sub_(offset).mul_(s)
        unit = torch.where(s == 0, 1, s)
        nearest = (w / unit).add_(offset).round_().clamp_(0, top).sub_(offset).mul_(s)
        moved, missed = (
            torch.zeros_like(scales).index_add_(1, group, (target - q) / unit) / counts.clamp(min=1)
            for target in (w, nearest)
        )
        means = torch.where(missed.abs() > _AS_NEAREST, moved, 0)
        sums += torch.stack(
            [
                total.double()
                for total in (
                    (w * w).sum(),
                    (w * q).sum(),
                    (w * nearest).sum(),
                    (q * q).sum(),
                    (w - q).square().sum(),
                    (w - nearest).square().sum(),
                    (means * counts).sum(),
                    (means > 0.5).sum() - (means < -0.5).sum(),
                )
            ]
        )
        if even and len(known):
            full, _ = grid(w[:, order].unflatten(1, (groups, -1)), config)
            beside.append(_beside_grids(scales, full, known, torch.finfo(weight.dtype).eps / 2))
    ww, wq, wn, qq, ee, nn, shift, shifted = (float(value) for value in sums)
    off_grid, rounded, stray = torch.cat(beside, 1).float()
    nan = float("nan")
    return Comparison(
        error=(ee / ww) ** 0.5 if ww else nan,
        over_nearest=(ee / nn) ** 0.5 if nn else 1.0,
        correlation=wq / (ww * qq) ** 0.5 if ww and qq else nan if ww == qq else 0.0,
        shift=shift / weight.numel(),
        shifted_groups=abs(shifted) / (groups * layer.out_features),
        gain=max(wq / ww, min(1.0, wq / wn)) if ww and wn else nan,
        off_grid=float(off_grid.mean()),
        rounded=float(rounded.mean()),
        stray=int(stray.sum()),
        misplaced=_misplaced(layer, zeros, weight),
    )


def _beside_grids(scales: Tensor, full: Tensor, ratios: Tensor, rounding: float) -> Tensor:
    """[3, groups] of booleans: what counts for `off_grid`, `rounded` and `stray` of `Comparison`.

    Args:
        scales: [rows, groups] of the layer.
        full: The same of a grid that covers the whole range of each group.
        ratios: The parts of it that a grid may cover.
        rounding: By how much the float model's dtype may have moved a weight.
    """
    apart = ((scales / full)[..., None] / ratios - 1).abs().amin(-1)
    slack = 1e-3 + 2.0**-24 / full  # of a scale in float16, where that is tiny too
    return torch.stack([(apart > slack + limit).flatten() for limit in (rounding, 0.0, _STRAY)])


def _misplaced(layer: QuantLinear, zeros: Tensor, weight: Tensor) -> float:
    """See `Comparison`. Decodes every channel with each group's grid; its own group should fit best."""
    groups, columns = layer.scales.shape[0], layer.in_features
    if groups == 1:
        return 0.0
    rows = max(_LEAST_ROWS, min(_MOST_ROWS, _DECODED // (groups * columns)))
    step = -(-layer.out_features // rows)
    w = weight[::step].float()
    codes = unpack_weight(layer.qweight[:, ::step].contiguous(), layer.bits, columns).float()
    scales, offsets = layer.scales[:, ::step].float(), zeros[:, ::step].float()
    errors = torch.stack(
        [((codes - z[:, None]) * s[:, None] - w).square().sum(0) for s, z in zip(scales, offsets, strict=True)]
    )
    own = errors.gather(0, layer.g_idx.long()[None])[0]
    return float((errors.amin(0) < own).float().mean())


def verdict(found: Comparison, bits: int, bfloat16_scales: bool = False) -> list[str]:
    """Returns a layer's faults, as sentences without its name; none if only its quantizer changed it.

    Not found at 2 bits: scales a few per cent off if the `ratios` are unknown, and a wrong g_idx of a symmetric layer.
    """
    if found.correlation < _CORRELATION:
        return [
            f"it does not hold the float model's weights (correlation below {_CORRELATION}): channels changed places, "
            "or another model"
        ]
    wrong = []
    if found.stray and found.off_grid <= _OFF_GRID:
        wrong.append(f"some scales ({found.stray}) are far from those of the quantized float weights: damage")
    elif abs(found.shift) > _SHIFT and found.shifted_groups < _FEW:
        wrong.append("a few groups are shifted by many steps: their scales or zeros are damaged")
    elif abs(found.shift) > _SHIFT:
        sign = "down" if found.shift > 0 else "up"
        wrong.append(f"weights are shifted {sign} by about {abs(found.shift):.0f} of a step: zeros off by one")
    elif found.shifted_groups > _SHIFTED_GROUPS:
        wrong.append("some groups are shifted by more than half a step: zeros off by one")
    if not math.isnan(found.off_grid):
        if found.off_grid > _OFF_GRID:
            wrong.append("scales are not those of the quantized float weights: they were changed or rounded")
        elif bfloat16_scales and found.rounded > _ROUNDED:
            wrong.append("scales were rounded to bfloat16, which moved weights by up to 0.4 %")
    elif not wrong and (found.gain > _GAIN or (bits >= 4 and found.gain < _GAIN_LOW)):
        than = "larger" if found.gain > 1 else "smaller"
        wrong.append(f"weights are {than} than the float ones: scales were changed")
    if not wrong and bits > 2 and found.misplaced > _MISPLACED:
        wrong.append("most channels' codes fit another group's scales better than their own: g_idx is wrong")
    if found.over_nearest > _OVER_NEAREST and not wrong:
        wrong.append(
            f"the error is more than {_OVER_NEAREST} times that of rounding to nearest: groups or codes are wrong"
        )
    return wrong
