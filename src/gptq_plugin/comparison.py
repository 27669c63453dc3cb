"""A quantized layer beside the float weight it was made from: statistics that its errors leave alone and damage moves.

Every quantizer's own error is in them: rounding, clipped ranges, and what GPTQ adds to later columns to make up for
earlier ones. What is compared is therefore not the error's size alone, but what such errors have in common: on average
they shift nothing, keep the scale, and are of the size that rounding to the same grid gives. The weights are read a
part of a layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.grid import grid
from gptq_plugin.packing import unpack_weight, unpack_zeros
from gptq_plugin.qlinear import QuantLinear

_PART = 2**23  # weights in memory at a time


@dataclass(frozen=True)
class Comparison:
    """A layer W and its quantized form Q, with step s and error W − Q.

    Attributes:
        error: ‖W − Q‖ / ‖W‖.
        over_nearest: ‖W − Q‖ over what rounding W to the nearest points of the same grids gives.
        correlation: Of W and Q: 0 where rows or columns changed places.
        shift: Mean of (W − Q) / s: 1 where zeros are off by one.
        shifted_groups: Share of the groups whose own mean of that is above 0.5 in size.
        slope: Σ W·Q / Σ Q·Q: 1 / 1.05 of the usual where scales are 5 % too large.
        range: Median over groups of s / (the step that covers the group's whole range); NaN where groups differ in size.
        off_grid: Share of the groups whose step is no `clip_ratios` part of that; NaN where these are not known.
    """

    error: float
    over_nearest: float
    correlation: float
    shift: float
    shifted_groups: float
    slope: float
    range: float
    off_grid: float


@torch.no_grad()
def compare(layer: QuantLinear, weight: Tensor, config: QuantizeConfig, ratios: Iterable[float] = ()) -> Comparison:
    """Compares a layer on the CPU with its float weight, [out, in].

    Args:
        layer: With true zeros.
        weight: Float, of any dtype.
        config: The layer's grid: sym and checkpoint_format are read.
        ratios: The parts of a group's range that its grid may cover, where the tool that wrote the layer is known to
            choose grids from the float weight.
    """
    bits, top = layer.bits, 2**layer.bits - 1
    group = layer.g_idx.long()
    groups = layer.scales.shape[0]
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=groups)
    even = bool((counts == counts[0]).all())
    zeros = unpack_zeros(layer.qzeros, bits, layer.out_features)
    sums = torch.zeros(8, dtype=torch.float64)
    ranges, off_grid = [], []
    rows = max(1, _PART // layer.in_features)
    for start in range(0, layer.out_features, rows):
        part = slice(start, start + rows)
        w = weight[part].float()
        scales, z = layer.scales[:, part].float().T, zeros[:, part].float().T  # [rows, G]
        s, offset = scales[:, group], z[:, group]
        codes = unpack_weight(layer.qweight[:, part].contiguous(), bits, layer.in_features)
        q = codes.float().sub_(offset).mul_(s)
        steps = (w - q) / torch.where(s == 0, 1, s)
        nearest = (w / torch.where(s == 0, 1, s)).add_(offset).round_().clamp_(0, top).sub_(offset).mul_(s)
        means = torch.zeros_like(scales).index_add_(1, group, steps) / counts.clamp(min=1)
        sums += torch.stack(
            [
                total.double()
                for total in (
                    (w * w).sum(),
                    (w * q).sum(),
                    (q * q).sum(),
                    (w - q).square().sum(),
                    (w - nearest).square().sum(),
                    steps.sum(),
                    (means.abs() > 0.5).sum(),
                    w.sum(),
                )
            ]
        )
        if even:
            full, _ = grid(w[:, order].unflatten(1, (groups, -1)), config)
            share = scales / full
            ranges.append(share.flatten())
            known = torch.tensor(list(ratios))
            if len(known):
                off_grid.append((share[..., None] / known - 1).abs().amin(-1).flatten())
    ww, wq, qq, ee, nn, shift, shifted, _ = (float(value) for value in sums)
    nan = float("nan")
    return Comparison(
        error=(ee / ww) ** 0.5 if ww else nan,
        over_nearest=(ee / nn) ** 0.5 if nn else 1.0,
        correlation=wq / (ww * qq) ** 0.5 if ww and qq else nan,
        shift=shift / weight.numel(),
        shifted_groups=shifted / (groups * layer.out_features),
        slope=wq / qq if qq else nan,
        range=float(torch.cat(ranges).median()) if ranges else nan,
        off_grid=float((torch.cat(off_grid) > 2e-3).float().mean()) if off_grid else nan,
    )
