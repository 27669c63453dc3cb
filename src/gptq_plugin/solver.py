"""The solver: a weight matrix and its Hessian in, integers and scales out. Tensors only.

For a row w of a Linear and inputs x the rounding q minimises (w − q) H (w − q)ᵀ with H the mean of x xᵀ.
With Λ added to the diagonal and the columns permuted into the order they are visited, factor H + Λ = A·D·Aᵀ
(A unit triangular, `factor.py`). Then for every row, with e = w − q the error so far,

    t_j = w_j + Σ_{k before j} e_k·A_kj,    q_j = Round(t_j),    loss = Σ_j D_j·(t_j − q_j)² − Σ_j Λ_j·e_j²

which is GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1) written as Babai's nearest plane (Chen et al.,
arXiv:2507.18553). It differs from the original implementation in three ways: A comes from one Cholesky
factorisation of the reversed H instead of a factor of its inverse (a quarter of the flops, and more accurate
in float32); errors are taken against the original weight, so nothing accumulates in it; and scales are
rounded to the checkpoint's float16 before the codes are chosen, so the codes fit the scales that are stored.

The loss is exact and rows are independent, so alternatives can be compared row by row: each row may have grids that
cover only a part of its groups' range (`clip_ratios`). A forecast picks the most promising alternatives of a row,
these are solved, and the best solution is kept. The forecast knows what the search for scales that nearest rounding
likes best does not: how much an error in each column matters in the end (D_j), and how far the errors before will
have moved its target: if they are uniform within a step s, by s·√(Σ_k A_kj²/12).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.factor import Factor, attempts, factorize
from gptq_plugin.grid import (
    SCALE_DTYPE,
    QuantizedWeight,
    grid,
    group_width,
    nearest_error,
    round_to_nearest,
    why_no_scale,
)
from gptq_plugin.kernels import solver_loops
from gptq_plugin.precision import full_precision, tf32
from gptq_plugin.split import Split, add_product

BLOCK = 128  # columns solved in one launch, before a matrix product tells their errors to the rest of their span
SPAN = 512  # columns whose errors reach the rest through one larger product
_STRIP = 1024  # columns in one product of the losses
CANDIDATES = 2  # alternatives of each row that are solved


@dataclass(frozen=True)
class Solution:
    """What the solver found, and how far from the request it had to go.

    Attributes:
        weight: The quantized matrix.
        loss: [out], mean over tokens of the squared output error of each row, without damping.
        rtn_loss: [out], the same for round-to-nearest on the same kind of grid.
        method: "gptq", or "rtn" where the Hessian could not be used.
        damp_percent: The damping that was used.
        deviations: A sentence for everything that differs from what was asked.
    """

    weight: QuantizedWeight
    loss: Tensor
    rtn_loss: Tensor
    method: str
    damp_percent: float
    deviations: tuple[str, ...] = ()


def solve(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    """GPTQ for one matrix, or for several that read the same input, stacked along their rows.

    Args:
        weight: [out, in], any floating dtype, finite.
        hessian: [in, in], the mean over tokens of x xᵀ, symmetric, float32 or float64, finite, on weight's device.
            Its dtype is the precision of the whole solve.
        config: bits, group_size, sym, desc_act, static_groups, damping, clip_ratios and checkpoint_format are read.

    Raises:
        ValueError: The weight or the Hessian is not finite, or a scale exceeds float16.
    """
    return solve_batch(weight[None], hessian[None], config)[0]


def solve_batch(weights: Tensor, hessians: Tensor, config: QuantizeConfig) -> list[Solution]:
    """`solve` for several matrices of one shape, each with a Hessian of its own, in the same launches.

    Args:
        weights: [B, out, in].
        hessians: [B, in, in].
        config: As for `solve`.
    """
    with full_precision(weights.device):
        weights = weights.detach().to(hessians.dtype)
        factor, good = factorize(hessians, config, hessians.dtype, config.damp_percent)
        solutions, scales = _solve(weights, factor, config, config.damp_percent, ())
        finite = torch.isfinite(hessians.diagonal(dim1=1, dim2=2)).all(1)
        # Only here is the device waited for: with everything queued, it never waits for Python.
        verdicts = torch.stack([good, finite, scales], 1).tolist()
        for number, (is_good, is_finite, has_scales) in enumerate(verdicts):
            if not is_finite:
                raise ValueError("the Hessian holds NaN or infinity")
            if not is_good:
                solutions[number] = _try_harder(weights[number], hessians[number], config)
            elif not has_scales:
                raise ValueError(why_no_scale(weights[number]))
        return solutions


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ for every row e = w − q of [out, in]: [out], the mean over tokens of the squared output error."""
    return ((error @ hessian) * error).sum(dim=1)


def _try_harder(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    """After the factor that was asked for could not be made: float64, more damping, and at last round-to-nearest."""
    for dtype, damp_percent in islice(attempts(hessian.dtype, config), 1, None):
        factor, good = factorize(hessian[None], config, dtype, damp_percent)
        if good.item():
            said = ["Hessian factored in float64 after float32 failed"] if dtype != hessian.dtype else []
            if damp_percent != config.damp_percent:
                said.append(f"damp_percent raised from {config.damp_percent:g} to {damp_percent:g}")
            (solution,), scales = _solve(weight[None], factor, config, damp_percent, tuple(said))
            if not scales.item():
                raise ValueError(why_no_scale(weight))
            return solution
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinity")
    if (hessian.diagonal() > 0).any():
        *_, (_, damp_percent) = attempts(hessian.dtype, config)
        why = f"no Cholesky factor up to damp_percent {damp_percent:g}"
    else:
        damp_percent, why = config.damp_percent, "no calibration input reached this layer"
    nearest = round_to_nearest(weight, config)
    loss = output_error(weight - nearest.dequantize(weight.dtype), hessian)
    return Solution(nearest, loss, loss, "rtn", damp_percent, (f"{why}: round-to-nearest",))


def _solve(
    weights: Tensor, factor: Factor, config: QuantizeConfig, damp_percent: float, deviations: tuple[str, ...]
) -> tuple[list[Solution], Tensor]:
    """The solutions, and bool [B], whether all their scales fit."""
    columns = _Columns(weights, factor, config)
    columns.visit()
    g_idx = columns.g_idx()
    solutions = []
    for number, weight in enumerate(weights):
        quantized = QuantizedWeight(
            codes=columns.codes[number].T,
            scales=columns.scales[number].to(SCALE_DTYPE),
            zeros=columns.zeros[number].to(torch.uint8),
            g_idx=g_idx[number],
            bits=config.bits,
            group_size=config.group_size,
        )
        rtn_loss = _loss(nearest_error(weight, config), factor, number)
        solutions.append(
            Solution(quantized, columns.loss[number].clamp(min=0), rtn_loss, "gptq", damp_percent, deviations)
        )
    return solutions, columns.fits


def _loss(error: Tensor, factor: Factor, number: int) -> Tensor:
    """`output_error` through the factor: half the flops, and a sum of squares as long as there is no damping.

    On a GPU it may use TF32: its rounding, 2^-11 of each factor, moves the sum of thousands of squares by less than
    0.1 %, and round-to-nearest's loss is there to be looked at, nothing is decided by it.
    """
    e = error[:, factor.order[number]]
    loss = -(e.square() @ factor.damping[number])
    with tf32(e.device):
        for start in range(0, e.shape[1], _STRIP):
            moved = e[:, start:] @ factor.rows[number, start : start + _STRIP, start:].T
            loss += moved.square_() @ factor.gain[number, start : start + _STRIP]
    return loss.clamp_(min=0)


class _Columns:
    """The recursion at the top of this file, for B matrices with A alternatives of each row, from the last position
    to the first. Everything is kept as [B, in, A·out], so that a column is contiguous.
    """

    def __init__(self, weights: Tensor, factor: Factor, config: QuantizeConfig):
        batch, self.rows, n = weights.shape
        self.factor, self.config = factor, config
        self.size = group_width(n, config)
        self.weight = weights.mT.contiguous()  # [B, in, out]
        self.channel = factor.order.int().contiguous()
        # A group is a run of input channels, or of columns in the order they are visited.
        grouped = weights
        if not config.static_groups:
            grouped = torch.stack([w[:, order.flip(0)] for w, order in zip(weights, factor.order, strict=True)])
        self.fits = torch.ones(batch, dtype=torch.bool, device=weights.device)  # whether float16 holds all scales
        self.span = torch.stack([self._candidates(grouped[b], b) for b in range(batch)])  # [B, A, out]
        width, groups = self.span.shape[1] * self.rows, n // self.size
        self.pushed = weights.new_zeros(batch, n, width)  # what errors push to each position, [B, in, A·out]
        self.codes = torch.empty(batch, n, width, dtype=torch.uint8, device=weights.device)  # by channel
        self.loss = weights.new_zeros(batch, width)
        if config.static_groups:
            scales, zeros = zip(
                *(_grids(grouped[b], self.span[b], self.size, config) for b in range(batch)), strict=True
            )
            self.scales, self.zeros = (torch.stack(t).flatten(1, 2).mT.contiguous() for t in (scales, zeros))
            self.group = factor.order // self.size
        else:
            self.scales = weights.new_ones(batch, groups, width)
            self.zeros = torch.zeros_like(self.scales)
            self.group = (torch.arange(n - 1, -1, -1, device=weights.device) // self.size).expand(batch, n)
        self.group = self.group.int().contiguous()

    def visit(self) -> None:
        """Fills codes and loss, then keeps each row's best alternative."""
        for start, stop in self._spans():
            if not self.config.static_groups:
                self._set_grid(start, stop)
            self._push(start, stop, self._visit_span(start, stop))
        self.fits &= torch.isfinite(self.scales).flatten(1).all(1)
        self._keep_best()

    def g_idx(self) -> Tensor:
        """The group of every channel, int32 [B, in]."""
        return torch.empty_like(self.group).scatter_(1, self.factor.order, self.group)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of positions from the end; a group each, where its scales depend on the errors before it."""
        width = SPAN if self.config.static_groups else self.size
        for stop in range(self.weight.shape[1], 0, -width):
            yield max(stop - width, 0), stop

    def _visit_span(self, first: int, last: int) -> Tensor:
        """The errors of the positions first..last, [B, ., A·out]."""
        pushed, rows = self.pushed[:, first:last], self.factor.rows
        errors, solve_block = torch.empty_like(pushed), solver_loops(self.weight).solve_block
        for stop in range(last, first, -BLOCK):
            start = max(stop - BLOCK, first)
            here, after = slice(start - first, stop - first), slice(stop - first, None)
            solve_block(
                torch.baddbmm(pushed[:, here], rows[:, start:stop, stop:last], errors[:, after]),
                self.weight,
                rows[:, start:stop, start:stop],
                self.scales,
                self.zeros,
                self.group[:, start:stop],
                self.channel[:, start:stop],
                self.factor.gain[:, start:stop],
                self.factor.damping[:, start:stop],
                self.codes,
                errors[:, here],
                self.loss,
                self.config.bits,
            )
        return errors

    def _push(self, start: int, stop: int, errors: Tensor) -> None:
        """Tells the errors of the positions start..stop to all positions before."""
        if start == 0:
            return
        pushed, rows = self.pushed[:, :start], self.factor.rows[:, :start, start:stop]
        if rows.is_cuda and rows.dtype == torch.float32:
            add_product(pushed, Split.of(rows), Split.of(errors))
        else:
            torch.baddbmm(pushed, rows, errors, out=pushed)

    def _candidates(self, weight: Tensor, number: int) -> Tensor:
        """The parts of the range whose grids promise each row the least loss: [A, out]."""
        widest_first = sorted(self.config.clip_ratios, reverse=True)
        ratios = torch.tensor(widest_first, dtype=weight.dtype, device=weight.device)
        spans = ratios[:, None].expand(-1, self.rows)
        if len(ratios) <= CANDIDATES:
            return spans
        scales, zeros = _grids(weight, spans, self.size, self.config)
        self.fits[number] = torch.isfinite(scales).all()  # no outlier is clipped because its grid cannot be stored
        spread = (torch.linalg.vector_norm(self.factor.rows[number], dim=1).square() - 1).clamp(min=0).div(12).sqrt()
        gain = self.factor.gain[number]
        if self.config.static_groups:
            back = self.factor.order[number].argsort()
            spread, gain = spread[back], gain[back]
        else:
            spread, gain = spread.flip(0), gain.flip(0)
        expected = solver_loops(weight).clipping_errors(weight, scales, zeros, spread, gain, self.config.bits)
        return spans.gather(0, expected.topk(CANDIDATES, dim=0, largest=False).indices)

    def _set_grid(self, start: int, stop: int) -> None:
        """The grids of the group at positions start..stop, from the weights as they have moved.

        Given the errors before, the best float weights solve the recursion without rounding:
        d_j = Σ_{k ≥ stop} e_k·A_kj − Σ_{j < k < stop} d_k·A_kj.
        """
        inner, pushed = self.factor.rows[:, start:stop, start:stop], self.pushed[:, start:stop]
        moved = torch.linalg.solve_triangular(inner, pushed, upper=True, unitriangular=True)
        channels = self.factor.order[:, start:stop, None].expand(-1, -1, self.rows)
        moved = moved.unflatten(2, (-1, self.rows)) + self.weight.gather(1, channels)[:, :, None]
        scales, zeros = grid((moved * self.span[:, None]).movedim(1, -1), self.config)
        group = (self.weight.shape[1] - stop) // self.size
        self.scales[:, group], self.zeros[:, group] = scales.flatten(1), zeros.flatten(1)

    def _keep_best(self) -> None:
        self.loss, best = self.loss.unflatten(1, (-1, self.rows)).min(1)

        def kept(values: Tensor) -> Tensor:
            wide = values.unflatten(2, (-1, self.rows))
            return wide.gather(2, best[:, None, None].expand(-1, values.shape[1], -1, -1)).squeeze(2)

        self.scales, self.zeros, self.codes = kept(self.scales), kept(self.zeros), kept(self.codes)


def _grids(weight: Tensor, spans: Tensor, size: int, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Scales and zeros [A, out, G] of a weight [out, in] whose alternatives cover `spans` [A, out] of the range."""
    low, high = weight.unflatten(1, (-1, size)).aminmax(dim=-1)  # a grid depends on a group's ends only
    return grid(torch.stack([low, high], -1) * spans[:, :, None, None], config)
