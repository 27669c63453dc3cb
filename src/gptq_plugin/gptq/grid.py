"""The grids that weights are rounded to, and a matrix on its grid.

A group of weights shares a scale, stored in float16, and a zero; its grid is the points scale·(code − zero).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.kernels import solver_passes

SCALE_DTYPE = torch.float16  # as checkpoints store scales
_SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number

COARSE_SCALE = 2.0**-18  # below it float16 rounds by up to 0.8 %, then by more; at 2^-24 it ends


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: W[o, i] ≈ scales[g, o]·(codes[o, i] − zeros[g, o]) with g = g_idx[i].

    Attributes:
        codes: uint8 [out, in], columns in the layer's own order.
        scales: float16 [G, out].
        zeros: uint8 [G, out], true zeros (v1 files store zeros minus one).
        g_idx: int32 [in], the group of every input channel.
        bits: Width of a code.
        group_size: As configured: channels per group, or -1.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    group_size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized matrix, [out, in]; computed in float32, or in `dtype` if that is wider."""
        wide = torch.promote_types(dtype, torch.float32)
        group = self.g_idx.long()
        offset = self.codes.to(wide).sub_(self.zeros.to(wide)[group].T)
        return offset.mul_(self.scales.to(wide)[group].T).to(dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Output rows start..stop as a separate matrix."""
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[:, start:stop].contiguous(),
            zeros=self.zeros[:, start:stop].contiguous(),
        )


def group_width(in_features: int, config: QuantizeConfig) -> int:
    """Number of input channels that share a scale."""
    return in_features if config.group_size == -1 else config.group_size


def grid(values: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Fits a grid to each group of weights; groups lie along the last dimension.

    A scale that overflows float16 or comes from NaN is not finite; `explain_bad_scale` tells which.

    Args:
        values: [..., g], float32 or float64.
        config: bits, sym and checkpoint_format are read.

    Returns:
        Scales, rounded to float16, and zeros; both [...] in the values' dtype.
    """
    top = 2**config.bits - 1
    if config.sym:
        scales = 2 * values.abs().amax(-1) / top
        zeros = torch.full_like(scales, 2 ** (config.bits - 1))
    else:
        least = least_zero(config)  # widen the grid until z is as large
        high = values.amax(-1).clamp(min=0)
        low = torch.minimum(values.amin(-1), -high * least / (top - least))
        scales = (high - low) / top
        zeros = torch.round(-low / torch.where(scales == 0, 1, scales)).clamp(least, top)  # least: a group of zeros
    scales = torch.where(scales == 0, 1, scales)  # a group of zeros: any scale fits
    return scales.clamp(min=_SMALLEST_SCALE).to(SCALE_DTYPE).to(values.dtype), zeros


def least_zero(config: QuantizeConfig) -> int:
    """The smallest zero a checkpoint can have. v1 stores z − 1, and clients read z = 0 differently."""
    return 1 if config.checkpoint_format == "gptq" else 0


def stored_scales(scales: Tensor) -> Tensor:
    """The nearest scales that a checkpoint can store, in the same dtype."""
    largest = torch.finfo(SCALE_DTYPE).max
    return scales.clamp(_SMALLEST_SCALE, largest).to(SCALE_DTYPE).to(scales.dtype)


def coarse_scales(groups: int) -> list[str]:
    """A sentence for the report if scales of so many groups are below `COARSE_SCALE`; none for no groups."""
    return [
        f"weights in {groups} groups are so small that float16, in which scales are stored, rounds theirs by a per "
        "cent or more, or loses them: multiply the weight by a power of two, and divide what reads the output by it"
    ][: groups > 0]


def explain_bad_scale(weight: Tensor) -> str:
    """The reason why `grid` gave a weight a scale that is not finite."""
    if not torch.isfinite(weight).all():
        return "the weight holds NaN or infinity"
    return (
        f"a weight of {weight.abs().max().item():.3g} needs a scale above float16's "
        f"{torch.finfo(SCALE_DTYPE).max:.0f}, the largest that checkpoints can store"
    )


@torch.no_grad()
def round_to_nearest(weight: Tensor, config: QuantizeConfig) -> QuantizedWeight:
    """Rounds every weight of [out, in] to the nearest point of its contiguous group's grid, without a Hessian.

    Raises:
        ValueError: The weight is not finite, or a scale exceeds float16.
    """
    size = group_width(weight.shape[1], config)
    groups = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, size))
    scales, zeros = grid(groups, config)  # [out, G]
    if not torch.isfinite(scales).all():
        raise ValueError(explain_bad_scale(weight))
    return QuantizedWeight(
        codes=_codes(groups, scales[..., None], zeros[..., None], config).flatten(1).to(torch.uint8),
        scales=scales.T.to(SCALE_DTYPE).contiguous(),
        zeros=zeros.T.to(torch.uint8).contiguous(),
        g_idx=torch.arange(weight.shape[1], device=weight.device, dtype=torch.int32) // size,
        bits=config.bits,
        group_size=config.group_size,
    )


def grids(weight: Tensor, spans: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Fits A alternative grids to each contiguous group of a weight, each covering a part of the group's range.

    Args:
        weight: [out, in], float32 or float64.
        spans: [A, out], the covered part for each row.
        config: As for `grid`; group_size too.

    Returns:
        Scales and zeros [A, out, G], as from `grid`.
    """
    # A grid depends only on its group's smallest and largest weight.
    low, high = weight.unflatten(1, (-1, group_width(weight.shape[1], config))).aminmax(dim=-1)
    return grid(torch.stack([low, high], -1) * spans[:, :, None, None], config)


def nearest_errors(weight: Tensor, config: QuantizeConfig, dtype: torch.dtype) -> Tensor:
    """Errors of `round_to_nearest`, weight − rounded, [out, in] in `dtype`; not finite where that raises."""
    scales, zeros = grids(weight, weight.new_ones(1, len(weight)), config)
    return solver_passes(weight).nearest_errors(weight.contiguous(), scales[0], zeros[0], config.bits, dtype)


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, config: QuantizeConfig) -> Tensor:
    return (groups / scales).add_(zeros).round_().clamp_(0, 2**config.bits - 1)
