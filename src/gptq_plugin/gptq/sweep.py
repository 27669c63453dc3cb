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
        rough: As for `add_products`.

    Returns:
        Codes, uint8 [B, n, A·rows] by channel, and losses [B, A·rows] as in `plain_solve.solve_span`.
    """
    codes = torch.empty_like(pushed, dtype=torch.uint8) if before is None else before.clone()
    loss = torch.zeros_like(pushed[:, 0])
    width = width or SPAN
    for stop in range(pushed.shape[1], 0, -width):
        start = max(stop - width, 0)
        if begin is not None:
            begin(start, stop)
        here, errors = slice(start, stop), torch.empty_like(pushed[:, start:stop])
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
            rough and columns.bounded,
        )
        if start:
            add_products(pushed[:, :start], columns.rows[:, :start, here], errors, columns.bounded, rough)
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


def add_products(out: Tensor, rows: Tensor, errors: Tensor, bounded: bool, rough: bool = False) -> None:
    """out[b] += rows[b] @ errors[b] for blocks of rows, [B, m, width], [1 or B, m, k] and [B, k, width].

    If it may be rough, a GPU multiplies float16 numbers, not pairs of them: a third of the work, and each term is right
    to 2^-11. A target is then off by a thousandth of a step of its grid, or, behind inputs much larger than others, by
    a few hundredths; losses are right to a thousandth.

    With the same rows for all blocks one follows the other: a library may choose another kernel for another number.
    """
    on_tensor_cores, batched = tensor_cores.usable(rows) and bounded, len(rows) > 1
    if on_tensor_cores and rough:
        left, right = tensor_cores.narrowed(rows, 1.0), tensor_cores.narrowed(errors, _SCALE)
    elif on_tensor_cores:
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
