"""Rounds a weight without a Hessian, each group on the grid that suits its weights best: `nearest`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import grids, group_width

_RATIOS = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # parts of a group's range that its grid covers


@torch.no_grad()
def nearest(weight: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Rounds every weight to the nearest point of its group's grid, which covers the part of the group's range with
    the least squared error.

    Args:
        weight: [out, in], any floating dtype, finite.
        config: bits, group_size, sym and checkpoint_format are read.

    Returns:
        The dequantized matrix [out, in], float32, and the sum of its squared errors, a float64 scalar.
    """
    exact = weight.detach().to(torch.float32)
    groups = exact.unflatten(1, (-1, group_width(exact.shape[1], config)))
    rounded = torch.empty_like(groups)
    least = torch.full_like(groups[..., :1], torch.inf)
    for ratio in _RATIOS:
        scales, zeros = (one[0, ..., None] for one in grids(exact, exact.new_full((1, len(exact)), ratio), config))
        tried = (groups / scales).add_(zeros).round_().clamp_(0, 2**config.bits - 1).sub_(zeros).mul_(scales)
        errors = (groups - tried).square_().sum(-1, keepdim=True)
        rounded = torch.where(errors < least, tried, rounded)
        least = torch.minimum(least, errors)
    return rounded.flatten(1), least.sum(dtype=torch.float64)
