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
from dataclasses import dataclass, replace
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
    round_to_nearest,
)
from gptq_plugin.gptq.losses import output_error, output_power, rounding_loss
from gptq_plugin.gptq.row_blocks import divided
from gptq_plugin.kernels import solver_loops, solver_passes

SPAN = 512  # columns whose errors are pushed to the others in one large product
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
        output_power: [out], mean over tokens of the squared output of the float weight.
        method: "gptq", or "rtn" if the Hessian was unusable.
        damp_percent: The damping used.
        deviations: A sentence for each difference from the request.
    """

    weight: QuantizedWeight
    loss: Tensor
    rtn_loss: Tensor
    output_power: Tensor
    method: str
    damp_percent: float
    deviations: tuple[str, ...]

    def first(self, rows: int) -> Solution:
        """The solution of the first rows alone."""
        if rows == len(self.loss):
            return self
        return replace(
            self,
            weight=self.weight.rows(0, rows),
            loss=self.loss[:rows],
            rtn_loss=self.rtn_loss[:rows],
            output_power=self.output_power[:rows],
        )


def solve(weight: Tensor, hessian: Tensor, config: QuantizeConfig, *, in_blocks: bool = True) -> Solution:
    """Solves one matrix, or several that read the same input, stacked along their rows.

    Args:
        weight: [out, in], any floating dtype, finite.
        hessian: [in, in], the mean over tokens of x xᵀ, symmetric, float32 or float64, finite, on weight's device.
            Its dtype is the solve's precision.
        in_blocks: Solve the rows in blocks, as ranks that share them do; see `row_blocks`.
        config: bits, group_size, sym, desc_act, static_groups, damping, clip_ratios and checkpoint_format are read.

    Raises:
        ValueError: The weight or the Hessian is not finite, or a scale exceeds float16.
    """
    return solve_blocks(divided(weight) if in_blocks else weight[None], hessian, config).first(len(weight))


def solve_blocks(blocks: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    """`solve` for rows in blocks of one size, each with the same result whatever other blocks are beside it.

    Args:
        blocks: [B, rows, in].
        hessian: As for `solve`.
        config: As for `solve`.

    Returns:
        The solution of all B·rows rows.
    """
    with full_precision(blocks.device):
        blocks = blocks.detach().to(hessian.dtype).contiguous()  # Conv1D's and some experts' are transposed
        with on_side_stream(blocks.device) as join:
            beside = _beside(blocks, hessian, config)
        factor, good = factorize(hessian[None], config, hessian.dtype, config.damp_percent)
        recursion = _Recursion(blocks, factor, config)
        finite = torch.isfinite(hessian.diagonal()).all()

        def read() -> AsyncRead:
            return AsyncRead(torch.stack([good[0], finite, recursion.fits]))

        # Read the verdict after queueing all work, so that the wait is as short as it can be.
        verdict = read() if config.static_groups else None
        recursion.visit()
        join()
        solution = _solution(recursion, beside, config.damp_percent, ())
        # Without static groups, grids are fitted along with the columns.
        is_good, is_finite, has_scales = (verdict or read()).get()
        if not is_finite:
            raise ValueError("the Hessian holds NaN or infinity")
        if not is_good:
            return _solve_with_fallbacks(blocks, hessian, config)
        if not has_scales:
            raise ValueError(explain_bad_scale(blocks))
        return solution


def _solve_with_fallbacks(blocks: Tensor, hessian: Tensor, config: QuantizeConfig) -> Solution:
    """Solves after the requested factorization failed: in float64, with more damping, at last by round-to-nearest."""
    for dtype, damp_percent in islice(attempts(hessian.dtype, config), 1, None):
        factor, good = factorize(hessian[None], config, dtype, damp_percent)
        if good.item():
            deviations = ["Hessian factored in float64 after float32 failed"] if dtype != hessian.dtype else []
            if damp_percent != config.damp_percent:
                deviations.append(f"damp_percent raised from {config.damp_percent:g} to {damp_percent:g}")
            recursion = _Recursion(blocks, factor, config)
            recursion.visit()
            if not recursion.fits.item():
                raise ValueError(explain_bad_scale(blocks))
            return _solution(recursion, _beside(blocks, hessian, config), damp_percent, tuple(deviations))
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinity")
    if (hessian.diagonal() > 0).any():
        *_, (_, damp_percent) = attempts(hessian.dtype, config)
        why = f"no Cholesky factor up to damp_percent {damp_percent:g}"
    else:
        damp_percent, why = config.damp_percent, "no calibration input reached this layer"
    nearest = round_to_nearest(blocks.flatten(0, 1), config)
    errors = blocks - nearest.dequantize(blocks.dtype).view_as(blocks)
    loss = torch.cat([output_error(error, hessian) for error in errors])
    power = output_power(blocks, hessian)
    return Solution(nearest, loss, loss, power, "rtn", damp_percent, (f"{why}: round-to-nearest",))


def _beside(blocks: Tensor, hessian: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """What the report compares a loss with, and nothing depends on: round-to-nearest's, and the output's power."""
    return rounding_loss(blocks, hessian, config), output_power(blocks, hessian)


def _solution(
    recursion: _Recursion, beside: tuple[Tensor, Tensor], damp_percent: float, deviations: tuple[str, ...]
) -> Solution:
    config, (rtn_loss, power) = recursion.config, beside
    codes, scales, zeros = (torch.cat(list(of), 1) for of in (recursion.codes, recursion.scales, recursion.zeros))
    return Solution(
        weight=QuantizedWeight(
            codes=codes.T,
            scales=scales.to(SCALE_DTYPE),
            zeros=zeros.to(torch.uint8),
            g_idx=recursion.g_idx(),
            bits=config.bits,
            group_size=config.group_size,
        ),
        loss=recursion.loss.flatten().clamp(min=0),
        rtn_loss=rtn_loss,
        output_power=power,
        method="gptq",
        damp_percent=damp_percent,
        deviations=deviations,
    )


class _Recursion:
    """The recursion of the module's docstring for B blocks of rows with A alternatives of each row, from the last
    position to the first. Tensors are [B, in, A·rows], so that columns are contiguous.

    Blocks go through the loops together, and through products one after the other: see `row_blocks`. Each row is solved
    in its own unit, a power of two above its largest weight. This does not change the result; with static groups errors
    w − q stay below 4, since no grid extends beyond 4/3 of the largest weight.

    Args:
        weights: [B, rows, in].
        factor: Of one Hessian, for all blocks.
        config: As for `solve`.
    """

    def __init__(self, weights: Tensor, factor: Factor, config: QuantizeConfig):
        batch, self.rows, n = weights.shape
        self.factor, self.config = factor, config
        self.order = factor.order[0]
        self.size = group_width(n, config)
        exponent = torch.frexp(weights.abs().amax(2)).exponent.clamp(_LEAST_UNIT, 100)
        self.unit = torch.ldexp(weights.new_ones(batch, self.rows), exponent)  # [B, rows]
        self.weight = torch.empty_like(weights.mT, memory_format=torch.contiguous_format)  # [B, in, rows]
        torch.div(weights.mT, self.unit[:, None], out=self.weight)
        self.channel = self.order.int().contiguous()
        # A group is a run of input channels or, without static groups, of columns in the order they are visited.
        grouped = weights if config.static_groups else weights[:, :, self.order.flip(0)]
        self.fits = torch.ones((), dtype=torch.bool, device=weights.device)  # all scales are finite in float16
        self.span = self._candidates(grouped)  # [B, A, rows]
        width, groups = self.span.shape[1] * self.rows, n // self.size
        self.pushed = weights.new_zeros(batch, n, width)  # by errors, to each position: [B, in, A·rows]
        self.codes = torch.empty(batch, n, width, dtype=torch.uint8, device=weights.device)  # by channel
        self.loss = weights.new_zeros(batch, width)
        if config.static_groups:
            fitted = [grids(w, span, config) for w, span in zip(grouped, self.span, strict=True)]
            scales, zeros = zip(*fitted, strict=True)
            self.zeros = torch.stack(zeros).flatten(1, 2).mT.contiguous()
            self.scales = (torch.stack(scales) / self.unit[:, None, :, None]).flatten(1, 2).mT.contiguous()
            self.fits &= torch.isfinite(self.scales).all()
            self.group = self.channel // self.size
        else:
            self.scales = weights.new_ones(batch, groups, width)
            self.zeros = torch.zeros_like(self.scales)
            self.group = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=weights.device) // self.size

    def visit(self) -> None:
        """Fills codes and loss, keeps each row's best alternative, and undoes the rows' units."""
        for start, stop in self._spans():
            if not self.config.static_groups:
                self._set_grid(start, stop)
            self._push(start, stop, self._visit_span(start, stop))
        if not self.config.static_groups:
            self.fits &= torch.isfinite(self.scales).all()
        self._keep_best()
        self.scales *= self.unit[:, None]
        self.loss *= self.unit.square()

    def g_idx(self) -> Tensor:
        """The group of every channel, int32 [in]."""
        return torch.empty_like(self.group).scatter_(0, self.order, self.group)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Yields ranges of positions from the end: single groups if their scales depend on earlier errors."""
        width = SPAN if self.config.static_groups else self.size
        for stop in range(self.weight.shape[1], 0, -width):
            yield max(stop - width, 0), stop

    def _visit_span(self, first: int, last: int) -> Tensor:
        """Solves positions first..last and returns their errors, [B, last − first, A·rows]."""
        here, errors = slice(first, last), torch.empty_like(self.pushed[:, first:last])
        solver_loops(self.weight).solve_span(
            self.pushed[:, here],
            self.weight,
            self.factor.rows[0, here, here],
            self.scales,
            self.zeros,
            self.group[here],
            self.channel[here],
            self.factor.gain[0, here],
            self.factor.damping[0, here],
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
        pushed, rows = self.pushed[:, :start].split(1), self.factor.rows[:, :start, start:stop]
        if tensor_cores.usable(rows) and self.config.static_groups:  # else errors are unbounded
            left, right = tensor_cores.left_operand(rows, 1.0), tensor_cores.right_operand(errors, _SCALE)
            for block, of_block in zip(pushed, right.split(1), strict=True):
                tensor_cores.add_product(block, left, of_block, alpha=1 / _SCALE)
        else:
            for block, of_block in zip(pushed, errors.split(1), strict=True):
                torch.baddbmm(block, rows, of_block, out=block)

    def _candidates(self, weights: Tensor) -> Tensor:
        """The parts of the range whose grids have the least expected loss for each row, [B, A, rows]."""
        widest_first = sorted(self.config.clip_ratios, reverse=True)
        # Pinned: otherwise the copy would wait for all queued work.
        ratios = torch.tensor(widest_first, dtype=weights.dtype, device="cpu", pin_memory=weights.is_cuda)
        ratios = ratios.to(weights.device, non_blocking=True)
        spans = ratios[:, None].expand(-1, self.rows)
        if len(ratios) <= CANDIDATES:
            return spans.expand(len(weights), -1, -1)
        norms, gain = torch.linalg.vector_norm(self.factor.rows[0], dim=1), self.factor.gain[0]
        spread = (norms.square() - 1).clamp(min=0).div(12).sqrt()
        # By channel, or in the order of visits.
        back = (
            self.order.argsort() if self.config.static_groups else torch.arange(len(gain), device=gain.device).flip(0)
        )
        spread, gain = spread[back], gain[back]
        chosen = []
        for weight in weights:
            scales, zeros = grids(weight, spans, self.config)
            self.fits &= torch.isfinite(scales).all()  # never clip just to fit float16
            expected = solver_passes(weight).clipping_errors(weight, scales, zeros, spread, gain, self.config.bits)
            chosen.append(spans.gather(0, expected.topk(CANDIDATES, dim=0, largest=False).indices))
        return torch.stack(chosen)

    def _set_grid(self, start: int, stop: int) -> None:
        """Fits the grids of the group at positions start..stop to the weights as moved by earlier errors.

        Given these errors, the best float weights solve the recursion without rounding:
        d_j = Σ_{k ≥ stop} e_k·A_kj − Σ_{j < k < stop} d_k·A_kj.
        """
        inner, pushed = self.factor.rows[:, start:stop, start:stop], self.pushed[:, start:stop].split(1)
        moved = torch.cat([torch.linalg.solve_triangular(inner, p, upper=True, unitriangular=True) for p in pushed])
        moved = moved.unflatten(2, (-1, self.rows)) + self.weight[:, self.order[start:stop], None]
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
            return wide.take_along_dim(best[:, None, None], 2).squeeze(2)

        self.scales, self.zeros, self.codes = kept(self.scales), kept(self.zeros), kept(self.codes)
