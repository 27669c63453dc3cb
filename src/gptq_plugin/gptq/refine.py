"""Steps that make the rounding of rows better: `improved`.

Each step is a function of the rows to round (`Rows`: targets, Hessian, order of columns) and of how they are rounded
(`Rounding`: codes and grids), to another rounding; a row takes that where its loss, (w − q) H (w − q)ᵀ without damping,
falls. All take the rows of B matrices with a Hessian each together. A step yields its loss, or how much that changes,
by the way: no product with the whole Hessian is left for it.
Scales are as stored, in float16, whenever a loss is computed. `plain_steps` of the kernels defines the steps. On a GPU
their products have float16 operands, and the losses of a layer are right to a thousandth.

- `regridded`: scales (and zeros) that suit the compensated targets t = q + A·(w − q), which earlier errors have moved
  away from the weights, each column weighted by its share D_j of the loss; then the recursion on these grids.
- `refitted`: the best scales for the codes, in closed form.
- `descended`: one sweep of coordinate descent over the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import least_zero, stored_scales
from gptq_plugin.gptq.recursion import Recursion, taken
from gptq_plugin.gptq.sweep import Columns, add_triangle, keep_best, shared, sweep
from gptq_plugin.gptq.tensor_cores import LARGEST
from gptq_plugin.kernels import solver_passes, step_passes

_FACTORS = (1.0, 0.8, 0.85, 0.9, 0.94, 0.97, 1.03, 1.06, 1.1, 1.16, 1.25)  # of scales tried in a round
_LARGEST_POINT = 3.0  # of a grid, in units of the row, where weights are below 1: errors stay below 4
_RIDGE = {torch.float64: 1e-7, torch.float32: 1e-5}  # of the mean diagonal entry, added to the equations for scales
_EQUATIONS = 2**25  # entries of equations for scales at a time


@dataclass(frozen=True)
class Rows:
    """Rows of B matrices to round, in their own units: [B, n, rows], so that columns are contiguous.

    Attributes:
        weight: The targets, [B, n, rows].
        unit: [B, rows], by which scales are multiplied before they are stored.
        recursion: GPTQ's order and factor.
        hessian: Without damping, for `refitted` and `descended`.
        groups: int64 [B, n], the input channels group by group.
        config: bits, sym and checkpoint_format are read.
    """

    weight: Tensor
    unit: Tensor
    recursion: Columns
    hessian: Arranged
    groups: Tensor
    config: QuantizeConfig

    @staticmethod
    def of(start: Recursion, hessians: Tensor, arranged: Arranged | None = None) -> Rows:
        """The rows that a recursion was made for.

        Args:
            start: The recursion, of as many matrices as factors.
            hessians: Theirs, [B, n, n].
            arranged: The Hessians, where they are arranged already.
        """
        groups = grouped_channels(start.factor.order, start.config)
        if arranged is None:
            arranged = Arranged.of(hessians, start.columns, groups, start.config)
        return Rows(start.weight, start.unit, start.columns, arranged, groups, start.config)

    def errors(self, now: Rounding, order: Tensor) -> Tensor:
        """w − q of the channels in some order, [B, n, rows]."""
        passes = step_passes(self.weight)
        return passes.rounding_errors(
            self.weight, now.codes, now.scales, now.zeros, self.group_of_channel(), order.contiguous()
        )

    def group_of_channel(self) -> Tensor:
        """int64 [B, n]."""
        numbers = torch.arange(self.groups.shape[1], device=self.groups.device)
        size = len(numbers) // self.group_count
        return torch.empty_like(self.groups).scatter_(1, self.groups, (numbers // size).expand_as(self.groups))

    @property
    def by_position(self) -> Tensor:
        """int64 [B, n], the channel at each position."""
        return torch.atleast_2d(self.recursion.channel).long()

    @property
    def group_count(self) -> int:
        size = self.config.group_size
        return 1 if size == -1 else self.groups.shape[1] // size

    def storable(self, scales: Tensor, zeros: Tensor, some: slice = slice(None)) -> Tensor:
        """Scales [..., B, G, rows] of some rows as they would be stored; no grid goes beyond `_LARGEST_POINT`."""
        top, unit = 2**self.config.bits - 1, self.unit[:, None, some]
        if self.recursion.bounded:
            scales = torch.minimum(scales, _LARGEST_POINT / torch.maximum(zeros, top - zeros))
        return stored_scales(scales * unit) / unit


@dataclass(frozen=True)
class Rounding:
    """How rows are rounded.

    Attributes:
        codes: uint8 [B, n, rows], by channel.
        scales, zeros: [B, G, rows]; scales in the rows' units.
        loss: [B, rows], without damping, in squared units.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    loss: Tensor

    @staticmethod
    def of(start: Recursion) -> Rounding:
        """That of a recursion, after `visit_in_units`."""
        return Rounding(start.codes, start.scales, start.zeros, start.loss)

    def in_units_of_weights(self, rows: Rows) -> Rounding:
        """The rounding with scales and losses of the rows as they were given."""
        unit = rows.unit
        return Rounding(self.codes, self.scales * unit[:, None], self.zeros, self.loss * unit.square())


@dataclass(frozen=True)
class Arranged:
    """Hessians in the orders in which steps read them.

    Attributes:
        descent: Columns with which a sweep is one of coordinate descent: entry (j, k) of rows is H_jk / (H_jj + Λ_j).
        grouped: From `plain_steps.grouped_hessian`.
    """

    descent: Columns
    grouped: tuple[Tensor, Tensor]

    @staticmethod
    def of(hessians: Tensor, recursion: Columns, groups: Tensor, config: QuantizeConfig) -> Arranged:
        """Hessians [B, n, n] without damping.

        Args:
            hessians: They stay as they are.
            recursion: The order of visits, and the damping.
            groups: The channels group by group, [B, n].
            config: damp_percent is read.
        """
        permute, one = solver_passes(hessians).permute, hessians.new_ones(len(hessians))
        rows = permute(hessians, torch.atleast_2d(recursion.channel).long(), one)
        gain = rows.diagonal(dim1=1, dim2=2) + torch.atleast_2d(recursion.damping)
        rows /= gain[:, :, None]
        # Entries are at most √(H_kk / Λ_j) / 2, and H_kk at most the trace.
        bounded = recursion.bounded and gain.shape[1] <= 4 * config.damp_percent * LARGEST**2
        descent = dataclasses.replace(recursion, rows=rows, gain=shared(gain), bounded=bounded)
        # With static groups they are runs of channels.
        by_group = hessians if config.static_groups else permute(hessians, groups, one)
        return Arranged(descent, step_passes(hessians).grouped_hessian(by_group))


def grouped_channels(order: Tensor, config: QuantizeConfig) -> Tensor:
    """The input channels group by group, int64 [B, n]; order has the channel at each position."""
    return order.sort(1).values if config.static_groups else order.flip(1)


def improved(rows: Rows, now: Rounding) -> Rounding:
    """The rounding after all steps that the configuration asks for."""
    for _ in range(rows.config.scale_rounds):
        now = better(now, regridded(rows, now))
    for _ in range(rows.config.refit_rounds):
        now = better(now, refitted(rows, now))
        now = better(now, descended(rows, now))
    return now


def better(now: Rounding, other: Rounding) -> Rounding:
    """For each row the other rounding if its loss is less."""
    falls = other.loss < now.loss
    pairs = ((getattr(now, name), getattr(other, name)) for name in ("codes", "scales", "zeros"))
    codes, scales, zeros = (torch.where(falls[:, None], found, before) for before, found in pairs)
    return Rounding(codes, scales, zeros, torch.where(falls, other.loss, now.loss))


def regridded(rows: Rows, now: Rounding) -> Rounding:
    """Solves on grids picked for the compensated targets, and on those half way to them."""
    scales, zeros = _grids_to_try(rows, now)
    weight = rows.weight
    pushed = weight.new_zeros(*weight.shape[:2], scales.shape[2])
    codes, loss = sweep(rows.recursion, weight, scales, zeros, pushed, rows.config.bits, rough=True)
    del pushed
    loss, codes, scales, zeros = keep_best(loss, weight.shape[2], codes, scales, zeros)
    return Rounding(codes, scales, zeros, loss)


def refitted(rows: Rows, now: Rounding) -> Rounding:
    """The scales with the least loss for the codes as they are, where they are not far from the scales so far.

    Solves M·d = b for the change of the scales, see `plain_steps.scale_equations`; on a CPU in float64.
    """
    errors, equations = rows.errors(now, rows.groups), step_passes(rows.weight).scale_equations
    found = []
    for some in _slices(errors.shape[2], _EQUATIONS // rows.group_count**2 // len(errors)):
        matrix, right = equations(rows.hessian.grouped, now.codes, now.zeros, errors, rows.groups, some)
        before = now.scales[:, :, some]
        fitted = before + _solution(matrix.flatten(0, 1), right.flatten(0, 1)).view_as(right).mT.to(before.dtype)
        near = (fitted > before / 2) & (fitted < before * 2)
        scales = rows.storable(torch.where(near, fitted, before), now.zeros[:, :, some], some)
        change = (scales - before).mT.to(matrix.dtype)
        found.append((scales, now.loss[:, some] + _change(matrix, right, change).to(now.loss.dtype)))
    scales, losses = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    return Rounding(now.codes, scales, now.zeros, losses)


def descended(rows: Rows, now: Rounding) -> Rounding:
    """Sets each code once to the best for all others, in the order of GPTQ's visits.

    It is the recursion with other rows: a column's target also takes the errors that columns still to come have so far.
    """
    pushed, descent, bits = _pushed_by_all(rows, now), rows.hessian.descent, rows.config.bits
    codes, change = sweep(descent, rows.weight, now.scales, now.zeros, pushed, bits, before=now.codes, rough=True)
    return Rounding(codes, now.scales, now.zeros, now.loss + change)


def _pushed_by_all(rows: Rows, now: Rounding) -> Tensor:
    """What the errors of columns still to come push to each, [B, n, rows]."""
    errors, descent = rows.errors(now, rows.by_position), rows.hessian.descent
    pushed = torch.zeros_like(errors)
    add_triangle(pushed, descent.rows, errors, descent.bounded, lower=True)
    return pushed


def _grids_to_try(rows: Rows, now: Rounding) -> tuple[Tensor, Tensor]:
    """For each row the grids picked for its compensated targets, and those half way to them, [B, G, 2·rows]."""
    scales, zeros = _picked_grids(rows, _targets(rows, now), now)
    half = rows.storable((scales * now.scales).sqrt(), now.zeros)
    return torch.cat([scales, half], 2), torch.cat([zeros, now.zeros], 2)


def _targets(rows: Rows, now: Rounding) -> Tensor:
    """t = q + A·(w − q) [B, n, rows], by position: what the recursion would have rounded to these points."""
    errors = rows.errors(now, rows.by_position)
    moved = taken(rows.weight, 1, shared(rows.by_position))
    add_triangle(moved, rows.recursion.rows, errors, rows.recursion.bounded)
    return moved


def _picked_grids(rows: Rows, targets: Tensor, now: Rounding) -> tuple[Tensor, Tensor]:
    """The grids [B, G, rows] near the present ones with the least error for the targets, each column weighted by D."""
    config, top = rows.config, 2**rows.config.bits - 1
    moves = (0,) if config.sym else (0, -1, 1)
    zeros = torch.stack([(now.zeros + move).clamp(least_zero(config), top) for move in moves for _ in _FACTORS])
    scales = rows.storable(torch.stack([now.scales * factor for _ in moves for factor in _FACTORS]), zeros)
    position = rows.by_position.argsort(1)
    gain = torch.atleast_2d(rows.recursion.gain)
    grid_errors = step_passes(targets).grid_errors
    errors = grid_errors(targets, position.gather(1, rows.groups), scales, zeros, gain, config.bits)
    best = errors.argmin(0)[None]  # [1, B, G, rows]
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def _solution(matrix: Tensor, right: Tensor) -> Tensor:
    """d of M d = b for every row, [rows, G], with a ridge; NaN where M is singular even so."""
    ridged = matrix.clone()
    diagonal = ridged.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE[matrix.dtype] * diagonal.mean(1, keepdim=True)
    lower, _ = torch.linalg.cholesky_ex(ridged)
    # Not cholesky_solve: of many systems on a GPU it makes the host wait.
    solved = torch.linalg.solve_triangular(lower, right[:, :, None], upper=False)
    return torch.linalg.solve_triangular(lower.mT, solved, upper=True)[:, :, 0]


def _change(matrix: Tensor, right: Tensor, change: Tensor) -> Tensor:
    """By how much losses change with the scales, d M dᵀ − 2 b·d, [B, rows]."""
    return ((matrix @ change[..., None])[..., 0] - 2 * right).mul_(change).sum(-1)


def _slices(length: int, width: int) -> Iterator[slice]:
    """Slices of at most so many rows, a multiple of 32 but for the last."""
    width = max(32, width // 32 * 32)
    return (slice(start, min(start + width, length)) for start in range(0, length, width))
