"""Steps that make the rounding of rows better: `improved`.

Each step is a function of the rows to round (`Rows`: targets, Hessian, order of columns) and of how they are rounded
(`Rounding`: codes and grids), to another rounding; a row takes that where its loss, (w − q) H (w − q)ᵀ without damping,
falls. Scales are as stored, in float16, whenever a loss is computed. `plain_steps` of the kernels defines the steps.

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
from gptq_plugin.gptq.losses import output_error
from gptq_plugin.gptq.recursion import Recursion
from gptq_plugin.gptq.sweep import Columns, add_products, keep_best, sweep
from gptq_plugin.gptq.tensor_cores import LARGEST
from gptq_plugin.kernels import grid_passes

_FACTORS = (1.0, 0.8, 0.85, 0.9, 0.94, 0.97, 1.03, 1.06, 1.1, 1.16, 1.25)  # of scales tried in a round
_LARGEST_POINT = 3.0  # of a grid, in units of the row, where weights are below 1: errors stay below 4
_RIDGE = 1e-7  # of the mean diagonal entry, added to the equations for scales
_STRIP = 1024  # columns of a triangle per product
_EQUATIONS = 2**25  # entries of equations for scales at a time


@dataclass(frozen=True)
class Rows:
    """Rows to round, in their own units: [1, n, rows], so that columns are contiguous.

    Attributes:
        weight: The targets, [1, n, rows].
        unit: [rows], by which scales are multiplied before they are stored.
        hessian: [n, n], without damping.
        recursion: GPTQ's order and factor.
        descent: The same order, with the damped Hessian's rows, each divided by its diagonal entry.
        groups: int64 [n], the input channels group by group.
        config: bits, sym and checkpoint_format are read.
    """

    weight: Tensor
    unit: Tensor
    hessian: Tensor
    recursion: Columns
    descent: Columns
    groups: Tensor
    config: QuantizeConfig

    @staticmethod
    def of(start: Recursion, hessian: Tensor, descent: Columns) -> Rows:
        """The one block of rows that a recursion was made for."""
        order = start.order if start.config.static_groups else start.order.flip(0)
        groups = order.sort().values if start.config.static_groups else order
        return Rows(start.weight, start.unit[0], hessian, start.columns, descent, groups, start.config)

    def errors(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """w − q, [n, rows] by channel."""
        group = self.group_of_channel()
        q = (codes.to(scales.dtype) - zeros[group]).mul_(scales[group])
        return torch.sub(self.weight[0], q, out=q)

    def group_of_channel(self) -> Tensor:
        """int64 [n]."""
        found = torch.empty_like(self.groups)
        size = len(self.groups) // self.group_count
        return found.scatter_(0, self.groups, torch.arange(len(found), device=found.device) // size)

    @property
    def group_count(self) -> int:
        size = self.config.group_size
        return 1 if size == -1 else len(self.groups) // size

    def by_position(self, values: Tensor) -> Tensor:
        """[n, rows] by channel, in the order of positions, [1, n, rows]."""
        return values[self.recursion.channel.long()][None]

    def storable(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """Scales [..., rows] as they would be stored; no grid goes beyond `_LARGEST_POINT`."""
        top = 2**self.config.bits - 1
        if self.recursion.bounded:
            scales = torch.minimum(scales, _LARGEST_POINT / torch.maximum(zeros, top - zeros))
        return stored_scales(scales * self.unit) / self.unit


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
    return Rounding(
        *(torch.where(falls, getattr(other, name), getattr(now, name)) for name in Rounding.__annotations__)
    )


def rounding(rows: Rows, codes: Tensor, scales: Tensor, zeros: Tensor) -> Rounding:
    """These codes on these grids, with their losses."""
    loss = output_error(rows.errors(codes, scales, zeros).mT, rows.hessian)
    return Rounding(codes, scales, zeros, loss)


def descent_columns(hessian: Tensor, columns: Columns, config: QuantizeConfig) -> Columns:
    """Columns with which a sweep is one of coordinate descent: entry (j, k) of rows is H_jk / (H_jj + Λ_j)."""
    channel = columns.channel.long()
    rows = hessian[channel][:, channel]
    rows /= (rows.diagonal() + columns.damping)[:, None]
    # Entries are at most √(H_kk / Λ_j) / 2, and H_kk at most the trace.
    bounded = columns.bounded and len(channel) <= 4 * config.damp_percent * LARGEST**2
    return dataclasses.replace(columns, rows=rows[None], bounded=bounded)


def regridded(rows: Rows, now: Rounding) -> Rounding:
    """Solves on grids picked for the compensated targets, and on those half way to them."""
    scales, zeros = _picked_grids(rows, _targets(rows, now), now)
    half = rows.storable((scales * now.scales).sqrt(), now.zeros)
    scales, zeros = torch.cat([scales, half], 1), torch.cat([zeros, now.zeros], 1)
    pushed = rows.weight.new_zeros(*rows.weight.shape[:2], scales.shape[1])
    codes, loss = sweep(rows.recursion, rows.weight, scales[None], zeros[None], pushed, rows.config.bits)
    del pushed
    _, codes, scales, zeros = keep_best(loss, rows.weight.shape[2], codes, scales[None], zeros[None])
    return rounding(rows, codes[0], scales[0], zeros[0])


def refitted(rows: Rows, now: Rounding) -> Rounding:
    """The scales with the least loss for the codes as they are, where they are not far from the scales so far.

    Solves for the change of the scales, M·d = b with M_gh = c_g H c_hᵀ and b_g = c_g H eᵀ, in float64.
    """
    centred = now.codes.to(now.scales.dtype) - now.zeros[rows.group_of_channel()]
    found = [
        _refitted_scales(rows, centred[:, part], now.scales[:, part], rows.weight[0, :, part])
        for part in _slices(centred.shape[1], _EQUATIONS // rows.group_count**2)
    ]
    fitted = torch.cat(found, 1)
    near = (fitted > now.scales / 2) & (fitted < now.scales * 2)
    scales = rows.storable(torch.where(near, fitted, now.scales), now.zeros)
    return rounding(rows, now.codes, scales, now.zeros)


def descended(rows: Rows, now: Rounding) -> Rounding:
    """Sets each code once to the best for all others, in the order of GPTQ's visits.

    It is the recursion with other rows: a column's target also takes the errors that columns still to come have so far.
    """
    errors, below = rows.by_position(rows.errors(now.codes, now.scales, now.zeros)), rows.descent.rows
    pushed = torch.zeros_like(errors)
    for start in range(0, errors.shape[1], _STRIP):
        here = slice(start, start + _STRIP)
        add_products(pushed[:, start:], below[:, start:, here].tril(-1), errors[:, here], rows.descent.bounded)
    codes, _ = sweep(rows.descent, rows.weight, now.scales[None], now.zeros[None], pushed, rows.config.bits)
    return rounding(rows, codes[0], now.scales, now.zeros)


def _targets(rows: Rows, now: Rounding) -> Tensor:
    """t = q + A·(w − q) [n, rows], by channel: what the recursion would have rounded to these points."""
    errors = rows.by_position(rows.errors(now.codes, now.scales, now.zeros))
    moved = rows.by_position(rows.weight[0])
    for start in range(0, errors.shape[1], _STRIP):
        here, stop = slice(start, start + _STRIP), min(start + _STRIP, errors.shape[1])
        strip = rows.recursion.rows[:, :stop, here].triu(1 - start)
        add_products(moved[:, :stop], strip, errors[:, here], rows.recursion.bounded)
    return torch.empty_like(moved[0]).index_copy_(0, rows.recursion.channel.long(), moved[0])


def _picked_grids(rows: Rows, targets: Tensor, now: Rounding) -> tuple[Tensor, Tensor]:
    """The grids [G, rows] near the present ones with the least error for the targets, each column weighted by D."""
    config, top = rows.config, 2**rows.config.bits - 1
    moves = (0,) if config.sym else (0, -1, 1)
    zeros = torch.stack([(now.zeros + move).clamp(least_zero(config), top) for move in moves for _ in _FACTORS])
    scales = torch.stack([now.scales * factor for _ in moves for factor in _FACTORS])
    scales = rows.storable(scales, zeros)
    gain = torch.empty_like(rows.recursion.gain).index_copy_(0, rows.recursion.channel.long(), rows.recursion.gain)
    grouped = targets[rows.groups].mT.contiguous()
    errors = grid_passes(grouped).grid_errors(
        grouped, scales.mT.contiguous(), zeros.mT.contiguous(), gain[rows.groups], config.bits
    )
    best = errors.argmin(0).mT[None]  # [1, G, rows]
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def _refitted_scales(rows: Rows, centred: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    """The fitted scales [G, rows] of some rows; NaN where M is singular.

    Args:
        rows: Of which these are some.
        centred: c = q − z, [n, rows], by channel.
        scales: So far, [G, rows].
        weight: [n, rows], by channel.
    """
    groups, size = len(scales), len(centred) // len(scales)
    hessian = rows.hessian[rows.groups][:, rows.groups]
    centred = centred[rows.groups].contiguous()
    errors = weight[rows.groups] - centred * scales.repeat_interleave(size, 0)
    right = (centred * (hessian @ errors)).unflatten(0, (groups, size)).sum(1)  # [G, rows]
    matrix = right.new_zeros(centred.shape[1], groups, groups, dtype=torch.float64)
    for group in range(groups):
        start, stop = group * size, (group + 1) * size
        product = (hessian[:stop, start:stop] @ centred[start:stop]).mul_(centred[:stop])
        matrix[:, group, : group + 1] = product.unflatten(0, (group + 1, size)).sum(1).mT
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True)
    lower, _ = torch.linalg.cholesky_ex(matrix)
    return scales + torch.cholesky_solve(right.mT[:, :, None].double(), lower)[:, :, 0].mT.to(scales.dtype)


def _slices(length: int, width: int) -> Iterator[slice]:
    """Slices of at most so many rows, a multiple of 32 but for the last."""
    width = max(32, width // 32 * 32)
    return (slice(start, min(start + width, length)) for start in range(0, length, width))
