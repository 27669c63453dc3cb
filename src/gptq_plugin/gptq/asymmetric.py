"""Weights that make up for what the quantized layers before a layer did to its inputs: `asymmetric_target`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.gptq import tensor_cores
from gptq_plugin.gptq.factor import Factor
from gptq_plugin.gptq.tensor_cores import accurate_product

_SPAN = 1024  # positions that are solved together; products push them to the others
_INVERTED = 128  # of these, that a library inverts


def asymmetric_target(blocks: Tensor, drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """W + α·W·C·(H + Λ)⁻¹ for blocks of rows, as `plain_steps` of the kernels defines it, one block after the other.

    The solver rounds these in place of the weights: with α = 1 and but for the damping, the rounding then minimises the
    mean of ‖W x − Ŵ x̂‖², not ‖W x̂ − Ŵ x̂‖² (as in LoaQ, arXiv:2509.06297, and Qronos, arXiv:2505.11695).

    On a GPU products are made of float16 parts, see `tensor_cores`: with fewer bits, sums in another order would move
    the correction by a thousandth of itself and more.

    Args:
        blocks: W [B, rows, in], in the factor's dtype.
        drift: C [in, in], or W·C of the blocks, [B, rows, in].
        factor: Of H + Λ = A·D·Aᵀ, in the order of visits.
        alpha: Share of the correction.

    Returns:
        [B, rows, in].
    """
    targets = torch.empty_like(blocks)
    for number, (target, block) in enumerate(zip(targets.split(1), blocks.split(1), strict=True)):
        if drift.dim() == 2:
            pulled = accurate_product(drift[None].mT, block.mT)
        else:
            pulled = drift[number : number + 1].mT
        _add(target, block, pulled, factor, alpha)
    return targets


def each_target(weights: Tensor, drifts: Tensor, factor: Factor, alpha: float) -> Tensor:
    """`asymmetric_target` for matrices with a drift and a Hessian each, all at once.

    Args:
        weights: W [B, rows, in], in the factors' dtype.
        drifts: C of each, [B, in, in].
        factor: Of B Hessians.
        alpha: Share of the correction.
    """
    targets = torch.empty_like(weights)
    _add(targets, weights, accurate_product(drifts.mT, weights.mT), factor, alpha)
    return targets


def _by_position(x: Tensor, order: Tensor) -> Tensor:
    """A copy of x [B, n, m] whose rows are in an order [B, n]."""
    return x.take_along_dim(order[:, :, None], 1)


def _add(targets: Tensor, weights: Tensor, pulled: Tensor, factor: Factor, alpha: float) -> None:
    """targets = weights + α·((H + Λ)⁻¹ pulled)ᵀ, of [B, rows, n], for pulled = (W·C)ᵀ [B, n, rows]."""
    upper, gain = factor.rows, factor.gain[:, :, None]
    x = _by_position(pulled, factor.order)
    if tensor_cores.usable(weights):
        _substitute(upper, gain, x)
    else:
        x = torch.linalg.solve_triangular(upper.mT, x, upper=False, unitriangular=True).div_(gain)
        x = torch.linalg.solve_triangular(upper, x, upper=True, unitriangular=True)
    torch.add(weights, _by_position(x, factor.order.argsort(1)).mT, alpha=alpha, out=targets)


def _substitute(upper: Tensor, gain: Tensor, x: Tensor) -> None:
    """Overwrites x [B, n, rows], by position, with (A·D·Aᵀ)⁻¹ x; upper is Aᵀ, gain D [B, n, 1].

    Triangles on the diagonal are inverted, and multiplied like the rest: a library's substitution goes row by row and
    takes ten times as long. Entries of their inverses are at most √(D_j / Λ_k).
    """
    n, inverses = x.shape[1], _inverses(upper)
    for number, start in enumerate(range(0, n, _SPAN)):
        here, after = slice(start, start + _SPAN), slice(start + _SPAN, n)
        x[:, here] = accurate_product(inverses[number].mT, x[:, here])
        _subtract(x[:, after], upper[:, here, after].mT, x[:, here])
    x /= gain
    for number, start in reversed(list(enumerate(range(0, n, _SPAN)))):
        here, before = slice(start, start + _SPAN), slice(0, start)
        x[:, here] = accurate_product(inverses[number], x[:, here])
        _subtract(x[:, before], upper[:, before, here], x[:, here])


def _inverses(upper: Tensor) -> list[Tensor]:
    """The inverses of the triangles of `_SPAN` columns, or less, on the diagonals of unit upper triangles [B, n, n]."""
    batch, n, _ = upper.shape
    starts = range(0, n, _SPAN)
    triangles = torch.eye(_SPAN, dtype=upper.dtype, device=upper.device).repeat(len(starts), batch, 1, 1)
    sizes = [min(_SPAN, n - start) for start in starts]
    for triangle, start, size in zip(triangles, starts, sizes, strict=True):
        triangle[:, :size, :size] = upper[:, start : start + size, start : start + size]
    found = _inverted(triangles.flatten(0, 1)).unflatten(0, (-1, batch))
    return [inverse[:, :size, :size] for inverse, size in zip(found, sizes, strict=True)]


def _inverted(triangles: Tensor) -> Tensor:
    """The inverses of unit upper triangles [B, k, k]; k is `_INVERTED` times a power of two, or less than it."""
    half = triangles.shape[1] // 2
    if half < _INVERTED:
        unit = torch.eye(2 * half, dtype=triangles.dtype, device=triangles.device)
        return torch.linalg.solve_triangular(triangles, unit, upper=True, unitriangular=True)
    first, second = _inverted(torch.cat([triangles[:, :half, :half], triangles[:, half:, half:]])).chunk(2)
    inverses = torch.zeros_like(triangles)
    inverses[:, :half, :half], inverses[:, half:, half:] = first, second
    inverses[:, :half, half:] = first @ triangles[:, :half, half:] @ second
    inverses[:, :half, half:] *= -1
    return inverses


def _subtract(x: Tensor, left: Tensor, solved: Tensor) -> None:
    """x −= left @ solved."""
    if x.shape[1]:
        x -= accurate_product(left, solved)
