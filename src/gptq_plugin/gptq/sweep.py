"""One sweep over the columns of blocks of rows, the last position first: the loop of GPTQ's recursion.

A column's target is its weight plus what was pushed to it, and the error of its rounding is pushed to the positions
before it. With the rows of a factor that is GPTQ (`recursion`); with those of the Hessian, each divided by its diagonal
entry, it is coordinate descent (`refine`).

Tested by tests/gptq/test_solver.py: on whole solutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.gptq import tensor_cores
from gptq_plugin.kernels import solver_loops

SPAN = 512  # columns whose errors are pushed to the others in one large product
_STRIP = 1024  # rows of a triangle per product
_SCALE = 2.0**12  # in `tensor_cores`, of errors that are below 4


@dataclass(frozen=True)
class Columns:
    """The columns in the order of their visits: position n − 1 first.

    Attributes:
        channel: int32 [n], the input channel at each position; or [B, n], for blocks with a Hessian each.
        group: int32 [n] or [B, n], the group at each position.
        rows: [1, n, n] or [B, n, n]; entry (j, k) is the share of the error at k > j that is pushed to j.
        gain, damping: [n] or [B, n], see `plain_solve.solve_span`.
        bounded: Errors are below 4 and entries of `rows` below `tensor_cores.LARGEST`, so that tensor cores may
            multiply them.
    """

    channel: Tensor
    group: Tensor
    rows: Tensor
    gain: Tensor
    damping: Tensor
    bounded: bool


def sweep(
    columns: Columns,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    pushed: Tensor,
    bits: int,
    width: int = 0,
    begin: Callable[[int, int], None] | None = None,
    before: Tensor | None = None,
    rough: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rounds every column to its group's grid.

    Args:
        columns: The order of visits, and what is pushed.
        weight: [B, n, rows], shared by A alternatives of each row.
        scales, zeros: [B, G, A·rows], the grids.
        pushed: [B, n, A·rows], to each position at the beginning; overwritten.
        bits: Width of a code.
        width: Positions in a span; 0 is `SPAN`.
        begin: Called as begin(start, stop) when the errors of all spans after that one are pushed to it.
        before: Codes so far: with them, losses are the changes from theirs.
        rough: A GPU may push errors in float16 and TF32, with each term right to 2^-11: a third of the work. A target
            is then off by a thousandth of a step of its grid, or, behind inputs much larger than others, by a few
            hundredths; losses are right to a thousandth.

    Returns:
        Codes, uint8 [B, n, A·rows] by channel, and losses [B, A·rows] as in `plain_solve.solve_span`.
    """
    codes = torch.empty_like(pushed, dtype=torch.uint8) if before is None else before.clone()
    loss = torch.zeros_like(pushed[:, 0])
    width, rough = width or SPAN, rough and columns.bounded
    narrow = torch.empty_like(pushed, dtype=torch.float16) if rough and tensor_cores.usable(pushed) else None
    for stop in range(pushed.shape[1], 0, -width):
        start = max(stop - width, 0)
        if begin is not None:
            begin(start, stop)
        here, errors = slice(start, stop), torch.empty_like(pushed[:, start:stop])
        if narrow is not None and stop < pushed.shape[1]:
            add_narrow_products(pushed[:, here], columns.rows[:, here, stop:], narrow[:, stop:])
        solver_loops(weight).solve_span(
            pushed[:, here],
            weight,
            shared(columns.rows)[..., here, here],
            scales,
            zeros,
            columns.group[..., here],
            columns.channel[..., here],
            columns.gain[..., here],
            columns.damping[..., here],
            codes,
            errors,
            loss,
            bits,
            before is not None,
            rough,
        )
        if narrow is not None:
            torch.mul(errors, _SCALE, out=narrow[:, here])
        elif start:
            add_products(pushed[:, :start], columns.rows[:, :start, here], errors, columns.bounded)
    return codes, loss


def shared(values: Tensor) -> Tensor:
    """What all blocks share, without the first dimension; or, with it, what each has, [B, ...]."""
    return values[0] if len(values) == 1 else values


def keep_best(loss: Tensor, rows: int, *values: Tensor) -> tuple[Tensor, ...]:
    """The alternative of each row with the least loss.

    Args:
        loss: [B, A·rows].
        rows: Number of rows.
        values: [B, m, A·rows], what the alternatives have.

    Returns:
        The least losses, [B, rows], and of the values those of that alternative, [B, m, rows].
    """
    least, best = loss.unflatten(1, (-1, rows)).min(1)
    kept = (v.unflatten(2, (-1, rows)).take_along_dim(best[:, None, None], 2).squeeze(2) for v in values)
    return least, *kept


def add_products(out: Tensor, rows: Tensor, errors: Tensor, bounded: bool) -> None:
    """out[b] += rows[b] @ errors[b] for blocks of rows, [B, m, width], [1 or B, m, k] and [B, k, width].

    With the same rows for all blocks one follows the other: a library may choose another kernel for another number.
    """
    on_tensor_cores, batched = tensor_cores.usable(rows) and bounded, len(rows) > 1
    if on_tensor_cores:
        left, right = tensor_cores.left_operand(rows, 1.0), tensor_cores.right_operand(errors, _SCALE)
    if batched and on_tensor_cores:
        tensor_cores.add_product(out, left, right, alpha=1 / _SCALE)
    elif batched:
        torch.baddbmm(out, rows, errors, out=out)
    elif on_tensor_cores:
        for block, of_block in zip(out.split(1), right.split(1), strict=True):
            tensor_cores.add_product(block, left, of_block, alpha=1 / _SCALE)
    else:
        for block, of_block in zip(out.split(1), errors.split(1), strict=True):
            torch.baddbmm(block, rows, of_block, out=block)


def add_triangle(out: Tensor, rows: Tensor, errors: Tensor, bounded: bool, lower: bool = False) -> None:
    """out[b] += T[b] @ errors[b], with T what is above the diagonal of rows, or below it, [B, n, n]; on a GPU as
    `sweep` does if it may be rough.

    Args:
        out: [B, n, width].
        rows: The whole matrices.
        errors: [B, n, width].
        bounded: As in `Columns`.
        lower: Below.
    """
    narrow = tensor_cores.narrowed(errors, _SCALE) if tensor_cores.usable(rows) and bounded else None
    for start in range(0, out.shape[1], _STRIP):
        here, stop = slice(start, start + _STRIP), min(start + _STRIP, out.shape[1])
        others = slice(0, stop) if lower else slice(start, None)
        part = rows[:, here, others]
        part = part.tril(start - 1) if lower else part.triu(1)
        if narrow is None:
            torch.baddbmm(out[:, here], part, errors[:, others], out=out[:, here])
        else:
            add_narrow_products(out[:, here], part, narrow[:, others])


def add_narrow_products(out: Tensor, rows: Tensor, narrow: Tensor) -> None:
    """out[b] += rows[b] @ errors[b], or rows[0] @ errors[b], on tensor cores, for errors in float16, times `_SCALE`."""
    left = tensor_cores.narrowed(rows, 1.0)
    if len(left) > 1:
        tensor_cores.add_product(out, left, narrow, alpha=1 / _SCALE)
        return
    for block, of_block in zip(out.split(1), narrow.split(1), strict=True):
        tensor_cores.add_product(block, left, of_block, alpha=1 / _SCALE)
