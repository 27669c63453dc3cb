"""Steps that make the rounding of rows better: `improved`.

Each step is a function of the rows to round (`Rows`: targets, Hessian, order of columns) and of how they are rounded
(`Rounding`: codes and grids), to another rounding; a row takes that where its loss, (w − q) H (w − q)ᵀ without damping,
falls. Steps that visit the columns take the rows of several Hessians, and visit them together. A step yields its loss,
or how much that changes, by the way: no product with the whole Hessian is left for it.
Scales are as stored, in float16, whenever a loss is computed. `plain_steps` of the kernels defines the steps. On a GPU
their products have float16 operands, and the losses of a layer are right to a thousandth.

- `regridded`: scales (and zeros) that suit the compensated targets t = q + A·(w − q), which earlier errors have moved
  away from the weights, each column weighted by its share D_j of the loss; then the recursion on these grids.
- `refitted`: the best scales for the codes, in closed form.
- `descended`: one sweep of coordinate descent over the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import least_zero, stored_scales
from gptq_plugin.gptq.recursion import Recursion
from gptq_plugin.gptq.sweep import Columns, add_triangle, keep_best, sweep
from gptq_plugin.gptq.tensor_cores import LARGEST
from gptq_plugin.kernels import solver_passes, step_passes

_FACTORS = (1.0, 0.8, 0.85, 0.9, 0.94, 0.97, 1.03, 1.06, 1.1, 1.16, 1.25)  # of scales tried in a round
_LARGEST_POINT = 3.0  # of a grid, in units of the row, where weights are below 1: errors stay below 4
_RIDGE = {torch.float64: 1e-7, torch.float32: 1e-5}  # of the mean diagonal entry, added to the equations for scales
_EQUATIONS = 2**25  # entries of equations for scales at a time


@dataclass(frozen=True)
class Rows:
    """Rows to round, in their own units: [1, n, rows], so that columns are contiguous.

    Attributes:
        weight: The targets, [1, n, rows].
        unit: [rows], by which scales are multiplied before they are stored.
        recursion: GPTQ's order and factor.
        hessian: Without damping, for `refitted` and `descended`.
        groups: int64 [n], the input channels group by group.
        config: bits, sym and checkpoint_format are read.
    """

    weight: Tensor
    unit: Tensor
    recursion: Columns
    hessian: Arranged
    groups: Tensor
    config: QuantizeConfig

    @staticmethod
    def of(start: Recursion, hessian: Tensor, number: int = 0, arranged: Arranged | None = None) -> Rows:
        """A block of rows that a recursion was made for.

        Args:
            start: The recursion.
            hessian: The block's, [n, n].
            number: The block's.
            arranged: The Hessian, where another block of the same one has arranged it.
        """
        columns, order = start.columns.of(number), start.order if start.order.dim() == 1 else start.order[number]
        groups = grouped_channels(order, start.config)
        if arranged is None:
            arranged = Arranged.of(hessian, columns, groups, start.config)
        weight = start.weight[number : number + 1]
        return Rows(weight, start.unit[number], columns, arranged, groups, start.config)

    def errors(self, now: Rounding, order: Tensor) -> Tensor:
        """w − q of the channels in some order, [n, rows]."""
        passes = step_passes(self.weight)
        return passes.rounding_errors(
            self.weight[0], now.codes, now.scales, now.zeros, self.group_of_channel(), order.contiguous()
        )

    def group_of_channel(self) -> Tensor:
        """int64 [n]."""
        found = torch.empty_like(self.groups)
        size = len(self.groups) // self.group_count
        return found.scatter_(0, self.groups, torch.arange(len(found), device=found.device) // size)

    @property
    def by_position(self) -> Tensor:
        """int64 [n], the channel at each position."""
        return self.recursion.channel.long()

    @property
    def group_count(self) -> int:
        size = self.config.group_size
        return 1 if size == -1 else len(self.groups) // size

    def storable(self, scales: Tensor, zeros: Tensor, some: slice = slice(None)) -> Tensor:
        """Scales [..., rows] of some rows as they would be stored; no grid goes beyond `_LARGEST_POINT`."""
        top = 2**self.config.bits - 1
        if self.recursion.bounded:
            scales = torch.minimum(scales, _LARGEST_POINT / torch.maximum(zeros, top - zeros))
        return stored_scales(scales * self.unit[some]) / self.unit[some]


@dataclass(frozen=True)
class Rounding:
    """How rows are rounded.

    Attributes:
        codes: uint8 [n, rows], by channel.
        scales, zeros: [G, rows]; scales in the rows' units.
        loss: [rows], without damping, in squared units.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Arranged:
    """A Hessian in the orders in which steps read it.

    Attributes:
        descent: Columns with which a sweep is one of coordinate descent: entry (j, k) of rows is H_jk / (H_jj + Λ_j).
        grouped: From `plain_steps.grouped_hessian`.
    """

    descent: Columns
    grouped: tuple[Tensor, Tensor]

    @staticmethod
    def of(hessian: Tensor, recursion: Columns, groups: Tensor, config: QuantizeConfig) -> Arranged:
        """A Hessian [n, n] without damping.

        Args:
            hessian: It stays as it is.
            recursion: The order of visits, and the damping.
            groups: The channels group by group.
            config: damp_percent is read.
        """
        channel, one = recursion.channel.long(), hessian.new_ones(1)
        rows = solver_passes(hessian).permute(hessian[None], channel[None], one)
        gain = rows[0].diagonal() + recursion.damping
        rows /= gain[:, None]
        # Entries are at most √(H_kk / Λ_j) / 2, and H_kk at most the trace.
        bounded = recursion.bounded and len(channel) <= 4 * config.damp_percent * LARGEST**2
        descent = dataclasses.replace(recursion, rows=rows, gain=gain, bounded=bounded)
        # With static groups they are runs of channels.
        by_group = hessian if config.static_groups else hessian[groups][:, groups]
        return Arranged(descent, step_passes(hessian).grouped_hessian(by_group))


def grouped_channels(order: Tensor, config: QuantizeConfig) -> Tensor:
    """The input channels group by group, int64 [n]; order has the channel at each position."""
    return order.sort().values if config.static_groups else order.flip(0)


def improved(each: Sequence[Rows], now: Sequence[Rounding]) -> Sequence[Rounding]:
    """The roundings after all steps that the configuration, one for all, asks for."""
    for _ in range(each[0].config.scale_rounds):
        now = list(map(better, now, regridded(each, now)))
    for _ in range(each[0].config.refit_rounds):
        now = list(map(better, now, map(refitted, each, now)))
        now = list(map(better, now, descended(each, now)))
    return now


def better(now: Rounding, other: Rounding) -> Rounding:
    """For each row the other rounding if its loss is less."""
    falls = other.loss < now.loss
    return Rounding(
        *(torch.where(falls, getattr(other, name), getattr(now, name)) for name in Rounding.__annotations__)
    )


def regridded(each: Sequence[Rows], now: Sequence[Rounding]) -> list[Rounding]:
    """Solves on grids picked for the compensated targets, and on those half way to them."""
    scales, zeros = map(_together, zip(*map(_grids_to_try, each, now), strict=True))
    weight, columns = _together([rows.weight for rows in each]), Columns.together([rows.recursion for rows in each])
    pushed = weight.new_zeros(*weight.shape[:2], scales.shape[2])
    codes, loss = sweep(columns, weight, scales, zeros, pushed, each[0].config.bits, rough=True)
    del pushed
    loss, codes, scales, zeros = keep_best(loss, weight.shape[2], codes, scales, zeros)
    return [Rounding(*of_one) for of_one in zip(codes, scales, zeros, loss, strict=True)]


def refitted(rows: Rows, now: Rounding) -> Rounding:
    """The scales with the least loss for the codes as they are, where they are not far from the scales so far.

    Solves M·d = b for the change of the scales, see `plain_steps.scale_equations`; on a CPU in float64.
    """
    errors, equations = rows.errors(now, rows.groups), step_passes(rows.weight).scale_equations
    found = []
    for some in _slices(errors.shape[1], _EQUATIONS // rows.group_count**2):
        matrix, right = equations(rows.hessian.grouped, now.codes, now.zeros, errors, rows.groups, some)
        before = now.scales[:, some]
        fitted = before + _solution(matrix, right).mT.to(before.dtype)
        near = (fitted > before / 2) & (fitted < before * 2)
        scales = rows.storable(torch.where(near, fitted, before), now.zeros[:, some], some)
        change = (scales - before).mT.to(matrix.dtype)
        found.append((scales, now.loss[some] + _change(matrix, right, change).to(now.loss.dtype)))
    scales, losses = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    return Rounding(now.codes, scales, now.zeros, losses)


def descended(each: Sequence[Rows], now: Sequence[Rounding]) -> list[Rounding]:
    """Sets each code once to the best for all others, in the order of GPTQ's visits.

    It is the recursion with other rows: a column's target also takes the errors that columns still to come have so far.
    """
    pushed = _together(list(map(_pushed_by_all, each, now)))
    weight = _together([rows.weight for rows in each])
    columns = Columns.together([rows.hessian.descent for rows in each])
    fields = ([getattr(one, name)[None] for one in now] for name in ("scales", "zeros", "codes"))
    scales, zeros, before = map(_together, fields)
    codes, change = sweep(columns, weight, scales, zeros, pushed, each[0].config.bits, before=before, rough=True)
    steps = zip(now, codes, change, strict=True)
    return [Rounding(found, one.scales, one.zeros, one.loss + falls) for one, found, falls in steps]


def _pushed_by_all(rows: Rows, now: Rounding) -> Tensor:
    """What the errors of columns still to come push to each, [1, n, rows]."""
    errors, descent = rows.errors(now, rows.by_position)[None], rows.hessian.descent
    pushed = torch.zeros_like(errors)
    add_triangle(pushed, descent.rows, errors, descent.bounded, lower=True)
    return pushed


def _grids_to_try(rows: Rows, now: Rounding) -> tuple[Tensor, Tensor]:
    """For each row the grids picked for its compensated targets, and those half way to them, [1, G, 2·rows]."""
    scales, zeros = _picked_grids(rows, _targets(rows, now), now)
    half = rows.storable((scales * now.scales).sqrt(), now.zeros)
    return torch.cat([scales, half], 1)[None], torch.cat([zeros, now.zeros], 1)[None]


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Parts [1, ...] as one tensor; not a copy of one alone."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _targets(rows: Rows, now: Rounding) -> Tensor:
    """t = q + A·(w − q) [n, rows], by position: what the recursion would have rounded to these points."""
    errors = rows.errors(now, rows.by_position)[None]
    moved = rows.weight[:, rows.by_position]
    add_triangle(moved, rows.recursion.rows, errors, rows.recursion.bounded)
    return moved[0]


def _picked_grids(rows: Rows, targets: Tensor, now: Rounding) -> tuple[Tensor, Tensor]:
    """The grids [G, rows] near the present ones with the least error for the targets, each column weighted by D."""
    config, top = rows.config, 2**rows.config.bits - 1
    moves = (0,) if config.sym else (0, -1, 1)
    zeros = torch.stack([(now.zeros + move).clamp(least_zero(config), top) for move in moves for _ in _FACTORS])
    scales = rows.storable(torch.stack([now.scales * factor for _ in moves for factor in _FACTORS]), zeros)
    position = torch.empty_like(rows.groups)
    position[rows.by_position] = torch.arange(len(position), device=position.device)
    errors = step_passes(targets).grid_errors(
        targets, position[rows.groups], scales, zeros, rows.recursion.gain, config.bits
    )
    best = errors.argmin(0)[None]  # [1, G, rows]
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
    """By how much losses change with the scales, d M dᵀ − 2 b·d, [rows]."""
    return ((matrix @ change[:, :, None])[:, :, 0] - 2 * right).mul_(change).sum(1)


def _slices(length: int, width: int) -> Iterator[slice]:
    """Slices of at most so many rows, a multiple of 32 but for the last."""
    width = max(32, width // 32 * 32)
    return (slice(start, min(start + width, length)) for start in range(0, length, width))
