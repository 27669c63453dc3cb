"""GPTQ's recursion over a span of columns in plain PyTorch: the definition, the CPU path, the oracle of `solve`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Columns solved one by one before a matrix product pushes their errors to the earlier ones.
_BLOCK = 128


def solve_span(
    pushed: Tensor,
    weight: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: Tensor,
    channel: Tensor,
    gain: Tensor,
    damping: Tensor,
    codes: Tensor,
    errors: Tensor,
    loss: Tensor,
    bits: int,
    changes: bool = False,
    rough: bool = False,
) -> None:
    """Runs GPTQ's recursion over some columns, the last one first, for B blocks of rows that share a Hessian, or have
    one each.

    Column j's target is its weight plus what is pushed to it from outside the span and from later columns of the span,
    t_j = w_j + pushed_j + Σ_{k>j} error_k·factor_jk. It is rounded to its group's grid. Every product is of one block
    where the blocks share a Hessian.

    Args:
        pushed: [B, columns, A·rows].
        weight: [B, n, rows], the whole weight, shared by the A alternatives of a row.
        factor: [columns, columns], unit upper triangular; or [B, columns, columns], one for each block.
        scales, zeros: [B, G, A·rows], the grids.
        group: int32 [columns], each column's grid; or [B, columns].
        channel: int32 [columns], which of the n channels each column is; with a factor for each block [B, columns].
        gain, damping: Like `channel`, with which a column's (t − q)² adds to the loss, and its (w − q)² is subtracted.
        codes: uint8 [B, n, A·rows]; the columns' channels are written.
        errors: [B, columns, A·rows], weight − scale·(code − zero); written.
        loss: [B, A·rows]; added to.
        bits: Width of a code.
        changes: The codes are those so far, and the loss that they would add is subtracted.
        rough: Errors may be pushed with less precision; here they are not.
    """
    batch, columns, width = pushed.shape
    alternatives = width // weight.shape[2]
    blocks: Any = torch.arange(batch, device=pushed.device) if factor.dim() == 3 else slice(None)
    channels, groups = _indices(channel), _indices(group)
    for stop in range(columns, 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        offset = _pushed_later(pushed, factor, errors, start, stop)
        for j in range(stop - 1, start - 1, -1):
            w = weight[blocks, channels[j]].repeat(1, alternatives)
            t = w + offset[:, j - start] + _pushed_near(factor, errors, j, stop)
            scale, zero = scales[blocks, groups[j]], zeros[blocks, groups[j]]
            q = torch.round(t / scale + zero).clamp_(0, 2**bits - 1)
            rounded = scale * (q - zero)
            d, damped = gain[..., j, None], damping[..., j, None]
            if changes:  # none, exactly, where the code stays
                moved = scale * (q - codes[blocks, channels[j]].to(q.dtype))
                loss -= moved * (d * (2 * (t - rounded) + moved) - damped * (2 * (w - rounded) + moved))
            else:
                loss += d * (t - rounded).square() - damped * (w - rounded).square()
            codes[blocks, channels[j]], errors[:, j] = q.to(codes.dtype), w - rounded


def _indices(of_columns: Tensor) -> list[Any]:
    """By column, an index for all blocks or one for each."""
    return of_columns.tolist() if of_columns.dim() == 1 else list(of_columns.long().unbind(1))


def _pushed_later(pushed: Tensor, factor: Tensor, errors: Tensor, start: int, stop: int) -> Tensor:
    """What is pushed to columns start..stop with the errors of later ones, in one product for each block."""
    here, later = pushed[:, start:stop], factor[..., start:stop, stop:]
    if factor.dim() == 3:
        return torch.baddbmm(here, later, errors[:, stop:])
    return torch.cat([torch.baddbmm(here[b : b + 1], later[None], errors[b : b + 1, stop:]) for b in range(len(here))])


def _pushed_near(factor: Tensor, errors: Tensor, j: int, stop: int) -> Tensor:
    """What the errors of the columns after j, up to stop, push to it, [B, A·rows]."""
    near = slice(j + 1, stop)
    if factor.dim() == 3:
        return torch.bmm(factor[:, j : j + 1, near], errors[:, near])[:, 0]
    return torch.stack([error[near].T @ factor[j, near] for error in errors])
