"""Weights whose scales, or codes too, are trained, and gradients for these, in plain PyTorch: the definition.

Tested by tests/kernels/test_latents.py: with the Triton kernels.

A weight [out, in] has codes less their zeros, as integers or as float32 latents that are rounded to them and held
within the ends of the grid, and a scale for each group of channels::

    W[o, i] = s[o, g(i)] * clamp(round(latent[o, i]), low[o, g(i)], high[o, g(i)])

Gradients pass the rounding unchanged, but for those of latents that would lead further beyond the ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weight_of(
    codes: Tensor, scales: Tensor, ends: tuple[Tensor, Tensor] | None, groups: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """W, [out, in]: exact in float32, as a scale has 11 bits and a code at most 9, then rounded once.

    Args:
        codes: [out, in], integers; or float32 latents.
        scales: float32 [out, G], each a float16.
        ends: Of grids with latents: low and high, float32 [out, G].
        groups: int64 [in], of channels; None if all are of one size and in order.
        dtype: Of the weight.
    """
    values = _by_group(codes, scales, groups)
    if ends is not None:
        values = _rounded(values, ends, groups)
    return (values * _of_channels(scales, groups)).to(dtype).view_as(codes)


def gradients(
    of_weight: Tensor, codes: Tensor, scales: Tensor, ends: tuple[Tensor, Tensor] | None, groups: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients for scales, float32 [out, G], and for latents, float32 [out, in]; None without `ends`.

    Args:
        of_weight: The weight's gradient, [out, in].
        codes, scales, ends, groups: As for `weight_of`.
    """
    of_values, values = _by_group(of_weight.float(), scales, groups), _by_group(codes, scales, groups)
    if ends is None:
        return _sums(of_values * values, groups, scales.shape[1]), None
    of_scales = _sums(of_values * _rounded(values, ends, groups), groups, scales.shape[1])
    of_latents = of_values * _of_channels(scales, groups)
    low, high = (_of_channels(end, groups) for end in ends)
    beyond = (values > high) & (of_latents < 0) | (values < low) & (of_latents > 0)
    return of_scales, of_latents.masked_fill_(beyond, 0.0).view_as(codes)


def _rounded(latents: Tensor, ends: tuple[Tensor, Tensor], groups: Tensor | None) -> Tensor:
    low, high = (_of_channels(end, groups) for end in ends)
    return latents.round().clamp_(low, high)


def _by_group(values: Tensor, like: Tensor, groups: Tensor | None) -> Tensor:
    """Values [out, in] for the sake of `_of_channels`: [out, G, channels] where groups are in order."""
    return values.unflatten(1, (like.shape[1], -1)) if groups is None else values


def _of_channels(values: Tensor, groups: Tensor | None) -> Tensor:
    """Values [out, G] of groups for their channels, to go with `_by_group`."""
    return values[..., None] if groups is None else values[:, groups]


def _sums(values: Tensor, groups: Tensor | None, count: int) -> Tensor:
    """Sums over the channels of each group, [out, groups]. The order of sums is always the same."""
    return values.sum(-1) if groups is None else values @ nn.functional.one_hot(groups, count).to(values.dtype)
