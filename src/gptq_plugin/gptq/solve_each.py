"""Matrices of one shape with a Hessian each, solved together: `solve_each`.

Each is solved as `solver.solve` solves one, but for the order of additions. What there is told by an exception is told
by a number here, and read once for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.precision import full_precision
from gptq_plugin.device.streams import on_side_stream
from gptq_plugin.gptq.asymmetric import each_target
from gptq_plugin.gptq.factor import WIDE, Factor, factorize
from gptq_plugin.gptq.grid import SCALE_DTYPE
from gptq_plugin.gptq.improve import EachImprovement, bytes_of_weight, improves
from gptq_plugin.gptq.losses import beside, each_loss
from gptq_plugin.gptq.recursion import Recursion
from gptq_plugin.gptq.sweep import SPAN

CHUNK_BYTES = 2**32  # of the tensors of matrices that are solved together
_FEW = (2, 4, 8)  # wide ones may take more: narrow steps of a single one leave most of a GPU idle
_SHARE_OF_FEW = 6  # of a device's memory, one part in so many
# Bytes, by the most that was allocated on a GPU; see docs/benchmarks/gpu-memory.md.
_BYTES_HESSIAN = 8  # for every entry: the factor, and copies on the way
_BYTES_WEIGHT = 10  # the stacked weights, in two dtypes and two layouts
_BYTES_ALTERNATIVE = 5  # likewise for every alternative of a row: what is pushed to it, and its codes
_BYTES_ERRORS = 12  # for every entry of an alternative's errors in a span, [SPAN, rows], and of their parts
_BYTES_SHARES = 6  # for every entry of the factor by which they are pushed, [in, SPAN]: its parts
_BYTES_DRIFT, _BYTES_TARGET = 8, 16  # for every entry of the Hessian, and of the weight, with asymmetric targets
_BYTES_STEPS = 12  # for every entry of either, if rounding is improved


@dataclass(frozen=True)
class Solutions:
    """B solved matrices; those that are not `good` hold garbage.

    Attributes:
        codes: uint8 [B, in, rows].
        scales: float16 [B, G, rows].
        zeros: uint8 [B, G, rows].
        g_idx: int32 [B, in].
        losses: [B, 3, rows]: loss, that of round-to-nearest, and power, as in `solver.Solution`.
        good: bool [B].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    losses: Tensor
    good: Tensor


def most(rows: int, columns: int, config: QuantizeConfig, memory: int = 0) -> int:
    """How many matrices of a shape to solve together. It follows from these alone: sums may depend on it.

    Args:
        rows, columns: The shape.
        config: As for `solve_each`.
        memory: Bytes of the device, if the number may depend on it: up to eight of more than `WIDE` columns take a
            sixth of them.
    """
    each = bytes_of_one(rows, columns, config)
    few = [number for number in _FEW if columns > WIDE and number * each <= memory // _SHARE_OF_FEW]
    return max(CHUNK_BYTES // each, *few, 1)


def bytes_of_one(rows: int, columns: int, config: QuantizeConfig) -> int:
    """Bytes that each of the matrices takes beside its weight and its Hessian, with the arguments of `most`."""
    number = min(2, config.clip_candidates, len(config.clip_ratios))  # of alternatives at a time
    is_asymmetric = bool(config.asymmetric_alpha)
    of_hessian = _BYTES_HESSIAN + _BYTES_DRIFT * is_asymmetric
    if improves(config):
        of_hessian += _BYTES_STEPS
        of_weight = bytes_of_weight(config) + _BYTES_STEPS + _BYTES_DRIFT * is_asymmetric
    else:
        of_weight = _BYTES_WEIGHT + _BYTES_ALTERNATIVE * number + _BYTES_TARGET * is_asymmetric
    of_span = SPAN * (rows * _BYTES_ERRORS * number + columns * _BYTES_SHARES)
    return columns * (columns * of_hessian + rows * of_weight) + of_span


def solve_each(
    weights: Tensor, hessians: Tensor, config: QuantizeConfig, damp_percents: Tensor, drifts: Tensor | None = None
) -> Solutions:
    """Solves matrices.

    Args:
        weights: [B, rows, in], any floating dtype.
        hessians: [B, in, in], float32 or float64, in which is solved.
        config: For all, as for `solver.solve`.
        damp_percents: [B], in place of the configuration's.
        drifts: C of each, [B, in, in] as for `solver.solve`; None rounds the weights themselves.
    """
    with full_precision(weights.device):
        weights = weights.detach().to(hessians.dtype).contiguous()
        damp_percents = damp_percents[:, None].to(hessians.dtype)
        with on_side_stream(weights.device) as join:
            factor, good = factorize(hessians, config, hessians.dtype, damp_percents)
        rtn_loss, power = beside(weights, hessians, config)
        join()
        finite, targets = torch.isfinite(hessians.diagonal(dim1=1, dim2=2)).all(1), weights
        if drifts is not None and config.asymmetric_alpha:
            targets = each_target(weights, drifts, factor, config.asymmetric_alpha)
            finite &= torch.isfinite(drifts).flatten(1).all(1)
        rounded = _begun(targets, hessians, factor, config)
        rounded.visit()
        scales, zeros, g_idx = rounded.scales.to(SCALE_DTYPE), rounded.zeros.to(torch.uint8), rounded.g_idx()
        g_idx = g_idx.expand(len(weights), -1)
        loss = rounded.loss.clamp(min=0)
        if targets is not weights or not isinstance(rounded, Recursion):  # of the targets, or right to a thousandth
            loss = each_loss(weights, hessians, rounded.codes, scales, zeros, g_idx)
        return Solutions(
            codes=rounded.codes,
            scales=scales,
            zeros=zeros,
            g_idx=g_idx,
            losses=torch.stack([loss, rtn_loss, power], 1),
            good=good & finite & rounded.fits_each,
        )


def _begun(targets: Tensor, hessians: Tensor, factor: Factor, config: QuantizeConfig) -> Recursion | EachImprovement:
    if improves(config):
        return EachImprovement(targets, hessians, factor, config)
    return Recursion(targets, factor, config)
