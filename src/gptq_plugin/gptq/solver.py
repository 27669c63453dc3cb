"""The solver: from a weight matrix and its Hessian to codes and scales. Tensors only.

For a row w of a Linear with inputs x, the rounding q minimises (w − q) H (w − q)ᵀ, with H the mean of x xᵀ. Add Λ to
the diagonal, permute the columns into the order they are visited, and factor H + Λ = A·D·Aᵀ (A unit triangular,
`factor.py`). Then for every row, with e = w − q the error so far,

    t_j = w_j + Σ_{k before j} e_k·A_kj,    q_j = Round(t_j),    loss = Σ_j D_j·(t_j − q_j)² − Σ_j Λ_j·e_j²

which is GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1) written as Babai's nearest plane (Chen et al.,
arXiv:2507.18553). It differs from the original implementation in three ways: A comes from one Cholesky factorization
of the reversed H instead of a factor of its inverse (a quarter of the flops, and more accurate in float32); errors are
taken against the original weight, so that rounding errors do not accumulate in it; and scales are rounded to the
checkpoint's float16 before the codes are chosen, so that codes match the stored scales.

The loss is exact and rows are independent, so alternatives are compared row by row: a row's grids may cover only a part
of its groups' range (`clip_ratios`). A forecast picks the most promising alternatives of a row; these are solved, and
the best solution is kept. Unlike a search for the scales with the least nearest-rounding error, the forecast weighs
each column by its share of the loss (D_j) and expects its target to be moved by earlier errors: if they are uniform
within a step s, by s·√(Σ_k A_kj²/12).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.precision import full_precision
from gptq_plugin.device.streams import AsyncRead, on_side_stream
from gptq_plugin.gptq import tensor_cores
from gptq_plugin.gptq.factor import Factor, attempts, factorize
from gptq_plugin.gptq.grid import (
    SCALE_DTYPE,
    QuantizedWeight,
    explain_bad_scale,
    grid,
    grids,
    group_width,
    nearest_errors,
    round_to_nearest,
)
from gptq_plugin.kernels import solver_loops, solver_passes

SPAN = 512  # columns whose errors are pushed to the others in one large product
_STRIP = 1024  # columns per product of a loss
_SCALE = 2.0**12  # in `tensor_cores`, of errors in units of their row: they are below 4 (`_Recursion`)
_LEAST_UNIT = -17  # exponent of the range of 8 bits with float16's smallest scale
CANDIDATES = 2  # alternatives solved for each row


@dataclass(frozen=True)
class Solution:
    """A solved weight, and how the solve deviated from the request.

    Attributes:
        weight: The quantized matrix.
        loss: [out], mean over tokens of the squared output error of each row, without damping.
        rtn_loss: [out], the same for round-to-nearest on the unclipped grid.
        method: "gptq", or "rtn" if the Hessian was unusable.
        damp_percent: The damping used.
        deviations: A sentence for each difference from the request.
    """

    weight: QuantizedWeight
    loss: Tensor
    rtn_loss: Tensor
    method: str
    damp_percent: float
    deviations: tuple[str, ...] = ()


def solve(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    """Solves one matrix, or several that read the same input, stacked along their rows.

    Args:
        weight: [out, in], any floating dtype, finite.
        hessian: [in, in], the mean over tokens of x xᵀ, symmetric, float32 or float64, finite, on weight's device.
            Its dtype is the solve's precision.
        config: bits, group_size, sym, desc_act, static_groups, damping, clip_ratios and checkpoint_format are read.

    Raises:
        ValueError: The weight or the Hessian is not finite, or a scale exceeds float16.
    """
    return solve_batch(weight[None], hessian[None], config)[0]


def solve_batch(weights: Tensor, hessians: Tensor, config: QuantizeConfig) -> list[Solution]:
    """`solve` for several matrices of one shape, each with its own Hessian, in the same launches.

    Args:
        weights: [B, out, in].
        hessians: [B, in, in].
        config: As for `solve`.
    """
    with full_precision(weights.device):
        weights = weights.detach().to(hessians.dtype).contiguous()  # Conv1D's and some experts' are transposed
        with on_side_stream(weights.device) as join:
            rtn_losses = [rounding_loss(w, h, config) for w, h in zip(weights, hessians, strict=True)]
        factor, good = factorize(hessians, config, hessians.dtype, config.damp_percent)
        recursion = _Recursion(weights, factor, config)
        finite = torch.isfinite(hessians.diagonal(dim1=1, dim2=2)).all(1)
        # Read the verdict after queueing all work, so that the wait is as short as it can be.
        verdict = AsyncRead(torch.stack([good, finite, recursion.fits], 1)) if config.static_groups else None
        recursion.visit()
        join()
        solutions = _solutions(recursion, rtn_losses, config.damp_percent, ())
        if verdict is None:  # grids are fitted along with the columns
            verdict = AsyncRead(torch.stack([good, finite, recursion.fits], 1))
        for number, (is_good, is_finite, has_scales) in enumerate(verdict.get()):
            if not is_finite:
                raise ValueError("the Hessian holds NaN or infinity")
            if not is_good:
                solutions[number] = _solve_with_fallbacks(weights[number], hessians[number], config)
            elif not has_scales:
                raise ValueError(explain_bad_scale(weights[number]))
        return solutions


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ for every row e = w − q of [out, in]: the mean over tokens of the squared output error, [out].

    Computes half of the product, since H is symmetric. 16-bit errors are summed in float32.
    """
    loss = torch.zeros(len(error), dtype=torch.promote_types(error.dtype, torch.float32), device=error.device)
    for start in range(0, error.shape[1], _STRIP):
        here = error[:, start : start + _STRIP]
        rows = hessian[start : start + _STRIP]
        loss += ((here @ rows[:, start : start + _STRIP]) * here).sum(1, dtype=loss.dtype)
        if start:
            loss += 2 * ((here @ rows[:, :start]) * error[:, :start]).sum(1, dtype=loss.dtype)
    return loss.clamp_(min=0)


def rounding_loss(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Tensor:
    """`output_error` of round-to-nearest, the report's baseline; nothing depends on it.

    On a GPU float32 weights are multiplied in bfloat16: each term is off by at most 2^-9, to either side, so the sum
    over thousands of rows and columns stays within 0.1 %.
    """
    dtype = torch.bfloat16 if tensor_cores.usable(weight) else weight.dtype
    return output_error(nearest_errors(weight, config, dtype), hessian.to(dtype)).to(weight.dtype)


def _solve_with_fallbacks(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    """Solves after the requested factorization failed: in float64, with more damping, at last by round-to-nearest."""
    for dtype, damp_percent in islice(attempts(hessian.dtype, config), 1, None):
        factor, good = factorize(hessian[None], config, dtype, damp_percent)
        if good.item():
            deviations = ["Hessian factored in float64 after float32 failed"] if dtype != hessian.dtype else []
            if damp_percent != config.damp_percent:
                deviations.append(f"damp_percent raised from {config.damp_percent:g} to {damp_percent:g}")
            recursion = _Recursion(weight[None], factor, config)
            recursion.visit()
            if not recursion.fits.item():
                raise ValueError(explain_bad_scale(weight))
            return _solutions(recursion, [rounding_loss(weight, hessian, config)], damp_percent, tuple(deviations))[0]
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


def _solutions(
    recursion: _Recursion, rtn_losses: list[Tensor], damp_percent: float, deviations: tuple[str, ...]
) -> list[Solution]:
    config, g_idx = recursion.config, recursion.g_idx()
    return [
        Solution(
            weight=QuantizedWeight(
                codes=recursion.codes[number].T,
                scales=recursion.scales[number].to(SCALE_DTYPE),
                zeros=recursion.zeros[number].to(torch.uint8),
                g_idx=g_idx[number],
                bits=config.bits,
                group_size=config.group_size,
            ),
            loss=recursion.loss[number].clamp(min=0),
            rtn_loss=rtn_loss,
            method="gptq",
            damp_percent=damp_percent,
            deviations=deviations,
        )
        for number, rtn_loss in enumerate(rtn_losses)
    ]


class _Recursion:
    """The recursion of the module's docstring for B matrices with A alternatives of each row, from the last position to
    the first. Tensors are [B, in, A·out], so that columns are contiguous.

    Each row is solved in its own unit, a power of two above its largest weight. This does not change the result; with
    static groups errors w − q stay below 4, since no grid extends beyond 4/3 of the largest weight.
    """

    def __init__(self, weights: Tensor, factor: Factor, config: QuantizeConfig):
        batch, self.rows, n = weights.shape
        self.factor, self.config = factor, config
        self.size = group_width(n, config)
        exponent = torch.frexp(weights.abs().amax(2)).exponent.clamp(_LEAST_UNIT, 100)
        self.unit = torch.ldexp(torch.ones_like(weights[:, :, 0]), exponent)  # [B, out]
        self.weight = torch.empty_like(weights.mT, memory_format=torch.contiguous_format)  # [B, in, out]
        torch.div(weights.mT, self.unit[:, None], out=self.weight)
        self.channel = factor.order.int().contiguous()
        # A group is a run of input channels or, without static groups, of columns in the order they are visited.
        grouped = weights
        if not config.static_groups:
            grouped = torch.stack([w[:, order.flip(0)] for w, order in zip(weights, factor.order, strict=True)])
        self.fits = torch.ones(batch, dtype=torch.bool, device=weights.device)  # all scales are finite in float16
        self.span = torch.stack([self._candidates(grouped[b], b) for b in range(batch)])  # [B, A, out]
        width, groups = self.span.shape[1] * self.rows, n // self.size
        self.pushed = weights.new_zeros(batch, n, width)  # by errors, to each position: [B, in, A·out]
        self.codes = torch.empty(batch, n, width, dtype=torch.uint8, device=weights.device)  # by channel
        self.loss = weights.new_zeros(batch, width)
        if config.static_groups:
            scales, zeros = zip(*(grids(grouped[b], self.span[b], config) for b in range(batch)), strict=True)
            self.zeros = torch.stack(zeros).flatten(1, 2).mT.contiguous()
            self.scales = (torch.stack(scales) / self.unit[:, None, :, None]).flatten(1, 2).mT.contiguous()
            self.fits &= torch.isfinite(self.scales).flatten(1).all(1)
            self.group = factor.order // self.size
        else:
            self.scales = weights.new_ones(batch, groups, width)
            self.zeros = torch.zeros_like(self.scales)
            self.group = (torch.arange(n - 1, -1, -1, device=weights.device) // self.size).expand(batch, n)
        self.group = self.group.int().contiguous()

    def visit(self) -> None:
        """Fills codes and loss, keeps each row's best alternative, and undoes the rows' units."""
        for start, stop in self._spans():
            if not self.config.static_groups:
                self._set_grid(start, stop)
            self._push(start, stop, self._visit_span(start, stop))
        if not self.config.static_groups:
            self.fits &= torch.isfinite(self.scales).flatten(1).all(1)
        self._keep_best()
        self.scales *= self.unit[:, None]
        self.loss *= self.unit.square()

    def g_idx(self) -> Tensor:
        """The group of every channel, int32 [B, in]."""
        return torch.empty_like(self.group).scatter_(1, self.factor.order, self.group)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Yields ranges of positions from the end: single groups if their scales depend on earlier errors."""
        width = SPAN if self.config.static_groups else self.size
        for stop in range(self.weight.shape[1], 0, -width):
            yield max(stop - width, 0), stop

    def _visit_span(self, first: int, last: int) -> Tensor:
        """Solves positions first..last and returns their errors, [B, last − first, A·out]."""
        here, errors = slice(first, last), torch.empty_like(self.pushed[:, first:last])
        solver_loops(self.weight).solve_span(
            self.pushed[:, here],
            self.weight,
            self.factor.rows[:, here, here],
            self.scales,
            self.zeros,
            self.group[:, here],
            self.channel[:, here],
            self.factor.gain[:, here],
            self.factor.damping[:, here],
            self.codes,
            errors,
            self.loss,
            self.config.bits,
        )
        return errors

    def _push(self, start: int, stop: int, errors: Tensor) -> None:
        """Pushes the errors of positions start..stop to all earlier positions."""
        if start == 0:
            return
        pushed, rows = self.pushed[:, :start], self.factor.rows[:, :start, start:stop]
        if tensor_cores.usable(rows) and self.config.static_groups:  # else errors are unbounded
            left, right = tensor_cores.left_operand(rows, 1.0), tensor_cores.right_operand(errors, _SCALE)
            tensor_cores.add_product(pushed, left, right, alpha=1 / _SCALE)
        else:
            torch.baddbmm(pushed, rows, errors, out=pushed)

    def _candidates(self, weight: Tensor, number: int) -> Tensor:
        """The parts of the range whose grids have the least expected loss for each row, [A, out]."""
        widest_first = sorted(self.config.clip_ratios, reverse=True)
        # Pinned: otherwise the copy would wait for all queued work.
        ratios = torch.tensor(widest_first, dtype=weight.dtype, device="cpu", pin_memory=weight.is_cuda)
        ratios = ratios.to(weight.device, non_blocking=True)
        spans = ratios[:, None].expand(-1, self.rows)
        if len(ratios) <= CANDIDATES:
            return spans
        scales, zeros = grids(weight, spans, self.config)
        self.fits[number] = torch.isfinite(scales).all()  # never clip just to fit float16
        spread = (torch.linalg.vector_norm(self.factor.rows[number], dim=1).square() - 1).clamp(min=0).div(12).sqrt()
        gain = self.factor.gain[number]
        if self.config.static_groups:
            back = self.factor.order[number].argsort()
            spread, gain = spread[back], gain[back]
        else:
            spread, gain = spread.flip(0), gain.flip(0)
        expected = solver_passes(weight).clipping_errors(weight, scales, zeros, spread, gain, self.config.bits)
        return spans.gather(0, expected.topk(CANDIDATES, dim=0, largest=False).indices)

    def _set_grid(self, start: int, stop: int) -> None:
        """Fits the grids of the group at positions start..stop to the weights as moved by earlier errors.

        Given these errors, the best float weights solve the recursion without rounding:
        d_j = Σ_{k ≥ stop} e_k·A_kj − Σ_{j < k < stop} d_k·A_kj.
        """
        inner, pushed = self.factor.rows[:, start:stop, start:stop], self.pushed[:, start:stop]
        moved = torch.linalg.solve_triangular(inner, pushed, upper=True, unitriangular=True)
        channels = self.factor.order[:, start:stop, None].expand(-1, -1, self.rows)
        moved = moved.unflatten(2, (-1, self.rows)) + self.weight.gather(1, channels)[:, :, None]
        unit = self.unit[:, None]
        scales, zeros = grid((moved * (self.span * unit)[:, None]).movedim(1, -1), self.config)
        group = (self.weight.shape[1] - stop) // self.size
        self.scales[:, group], self.zeros[:, group] = (scales / unit).flatten(1), zeros.flatten(1)

    def _keep_best(self) -> None:
        if self.loss.shape[1] == self.rows:
            return
        self.loss, best = self.loss.unflatten(1, (-1, self.rows)).min(1)

        def kept(values: Tensor) -> Tensor:
            wide = values.unflatten(2, (-1, self.rows))
            return wide.gather(2, best[:, None, None].expand(-1, values.shape[1], -1, -1)).squeeze(2)

        self.scales, self.zeros, self.codes = kept(self.scales), kept(self.zeros), kept(self.codes)
