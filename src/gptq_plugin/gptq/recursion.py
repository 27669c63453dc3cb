"""GPTQ's recursion over blocks of rows, with alternatives of each row: `Recursion`.

Tested by tests/gptq/test_solver.py: on whole solutions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.factor import Factor
from gptq_plugin.gptq.grid import grid, grids, group_width
from gptq_plugin.gptq.sweep import Columns, keep_best, shared, sweep
from gptq_plugin.kernels import solver_passes

_LEAST_UNIT = -17  # exponent of the range of 8 bits with float16's smallest scale


class Recursion:
    """The recursion of `solver` for B blocks of rows with A alternatives of each row, from the last position to the
    first. Tensors are [B, in, A·rows], so that columns are contiguous.

    Blocks go through the loops together, and if they share a Hessian through products one after the other: see
    `row_blocks`. Each row is solved
    in its own unit, a power of two above its largest weight. This does not change the result; with static groups errors
    w − q stay below 4, since no grid extends beyond 5/3 of the largest weight.

    Args:
        weights: [B, rows, in].
        factor: Of one Hessian for all blocks, or of one for each.
        config: As for `solve`.

    Attributes:
        targets: The weights, as given.
        order: The factor's, [in] or [B, in].
        fits_each: bool [B], all scales of a block are finite in float16; with static groups known before `visit`.
    """

    def __init__(self, weights: Tensor, factor: Factor, config: QuantizeConfig):
        batch, self.rows, n = weights.shape
        self.targets, self.factor, self.config = weights, factor, config
        self.order = shared(factor.order)
        self.size = group_width(n, config)
        exponent = torch.frexp(weights.abs().amax(2)).exponent.clamp(_LEAST_UNIT, 100)
        self.unit = torch.ldexp(weights.new_ones(batch, self.rows), exponent)  # [B, rows]
        self.weight = torch.empty_like(weights.mT, memory_format=torch.contiguous_format)  # [B, in, rows]
        torch.div(weights.mT, self.unit[:, None], out=self.weight)
        channel = self.order.int().contiguous()
        # A group is a run of input channels or, without static groups, of columns in the order they are visited.
        grouped = weights if config.static_groups else taken(weights, 2, self.order.flip(-1))
        self.fits_each = torch.ones(batch, dtype=torch.bool, device=weights.device)
        self.span = self._candidates(grouped)  # [B, A, rows]
        width, groups = self.span.shape[1] * self.rows, n // self.size
        self.pushed = weights.new_zeros(batch, n, width)  # by errors, to each position: [B, in, A·rows]
        if config.static_groups:
            scales, zeros = self._grids(grouped, self.span)
            self.zeros = zeros.flatten(1, 2).mT.contiguous()
            self.scales = (scales / self.unit[:, None, :, None]).flatten(1, 2).mT.contiguous()
            self.fits_each &= torch.isfinite(self.scales).flatten(1).all(1)
            group = channel // self.size
        else:
            self.scales = weights.new_ones(batch, groups, width)
            self.zeros = torch.zeros_like(self.scales)
            group = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=weights.device) // self.size
        gain, damping = shared(factor.gain), shared(factor.damping)
        self.columns = Columns(channel, group, factor.rows, gain, damping, bounded=config.static_groups)

    @property
    def fits(self) -> Tensor:
        """bool [], all of `fits_each`."""
        return self.fits_each.all()

    def visit(self) -> None:
        """Fills codes and loss, keeps each row's best alternative, and undoes the rows' units."""
        self.visit_in_units()
        self.scales *= self.unit[:, None]
        self.loss *= self.unit.square()

    def visit_in_units(self, rough: bool = False) -> None:
        """Fills codes and loss, and keeps each row's best alternative. Scales and losses are in the rows' units.

        Args:
            rough: As for `sweep.sweep`.
        """
        width, begin = (0, None) if self.config.static_groups else (self.size, self._set_grid)
        self.codes, self.loss = sweep(
            self.columns, self.weight, self.scales, self.zeros, self.pushed, self.config.bits, width, begin, rough=rough
        )
        del self.pushed
        if not self.config.static_groups:
            self.fits_each &= torch.isfinite(self.scales).flatten(1).all(1)
        if self.loss.shape[1] > self.rows:
            found = keep_best(self.loss, self.rows, self.scales, self.zeros, self.codes)
            self.loss, self.scales, self.zeros, self.codes = found

    def g_idx(self) -> Tensor:
        """The group of every channel, int32 [in] or [B, in]."""
        group = self.columns.group.expand_as(self.order)
        return torch.empty_like(self.columns.channel).scatter_(-1, self.order, group)

    def _candidates(self, weights: Tensor) -> Tensor:
        """The parts of the range whose grids have the least expected loss for each row, [B, A, rows]."""
        widest_first = sorted(self.config.clip_ratios, reverse=True)
        # Pinned: otherwise the copy would wait for all queued work.
        ratios = torch.tensor(widest_first, dtype=weights.dtype, device="cpu", pin_memory=weights.is_cuda)
        ratios = ratios.to(weights.device, non_blocking=True)
        spans = ratios[:, None].expand(-1, self.rows)
        if len(ratios) <= self.config.clip_candidates:
            return spans.expand(len(weights), -1, -1)
        norms, gain = torch.linalg.vector_norm(shared(self.factor.rows), dim=-1), shared(self.factor.gain)
        spread = (norms.square() - 1).clamp(min=0).div(12).sqrt()
        # By channel, or in the order of visits.
        back = (
            self.order.argsort()
            if self.config.static_groups
            else torch.arange(gain.shape[-1], device=gain.device).flip(0)
        )
        spread, gain = (taken(of_positions, -1, back) for of_positions in (spread, gain))
        scales, zeros = self._grids(weights, spans.expand(len(weights), -1, -1))
        self.fits_each &= torch.isfinite(scales).flatten(1).all(1)  # never clip just to fit float16
        errors, bits = solver_passes(weights).clipping_errors, self.config.bits
        if len(self.factor.gain) > 1:  # rows of all blocks, [A, B·rows]
            of_all = (grid.movedim(0, 1).flatten(1, 2).contiguous() for grid in (scales, zeros))
            expected = errors(weights.flatten(0, 1), *of_all, spread, gain, bits)
            chosen = self._least(expected, spans.repeat(1, len(weights)))
            return chosen.unflatten(1, (-1, self.rows)).movedim(1, 0)
        each = zip(weights, scales, zeros, strict=True)
        return torch.stack([self._least(errors(*one, spread, gain, bits), spans) for one in each])

    def _least(self, expected: Tensor, spans: Tensor) -> Tensor:
        """For each row the spans that promise most, of [A, rows]."""
        return spans.gather(0, expected.topk(self.config.clip_candidates, dim=0, largest=False).indices)

    def _grids(self, weights: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        """The grids of blocks of rows, [B, A, rows, G], that cover parts of the ranges, [B, A, rows]."""
        if len(self.factor.gain) > 1:  # blocks of one kind and many, in one call
            of_all = grids(weights.flatten(0, 1), spans.movedim(0, 1).flatten(1), self.config)
            scales, zeros = (one.unflatten(1, (-1, self.rows)).movedim(1, 0) for one in of_all)
            return scales, zeros
        found = [grids(weight, span, self.config) for weight, span in zip(weights, spans, strict=True)]
        scales, zeros = (torch.stack(of_all) for of_all in zip(*found, strict=True))
        return scales, zeros

    def _set_grid(self, start: int, stop: int) -> None:
        """Fits the grids of the group at positions start..stop to the weights as moved by earlier errors.

        Given these errors, the best float weights solve the recursion without rounding:
        d_j = Σ_{k ≥ stop} e_k·A_kj − Σ_{j < k < stop} d_k·A_kj.
        """
        inner, pushed = self.factor.rows[:, start:stop, start:stop], self.pushed[:, start:stop]
        blocks = [pushed] if len(inner) > 1 else pushed.split(1)
        moved = torch.cat([torch.linalg.solve_triangular(inner, p, upper=True, unitriangular=True) for p in blocks])
        here = taken(self.weight, 1, self.order[..., start:stop])
        moved = moved.unflatten(2, (-1, self.rows)) + here[:, :, None]
        unit = self.unit[:, None]
        scales, zeros = grid((moved * (self.span * unit)[:, None]).movedim(1, -1), self.config)
        group = (self.weight.shape[1] - stop) // self.size
        self.scales[:, group], self.zeros[:, group] = (scales / unit).flatten(1), zeros.flatten(1)


def taken(values: Tensor, dim: int, order: Tensor) -> Tensor:
    """Values [B, ...] along a dimension in an order for all blocks, [n], or one for each, [B, n]."""
    if order.dim() == 1:
        return values.index_select(dim, order)
    shape = [len(order), *(1 for _ in values.shape[1:])]
    shape[dim] = -1
    return values.take_along_dim(order.view(shape), dim)
