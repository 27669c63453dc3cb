"""Weights that make up for what the quantized layers before a layer did to its inputs: `asymmetric_target`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.gptq import tensor_cores
from gptq_plugin.gptq.factor import Factor

_SPAN = 1024  # positions that are solved together; products push them to the others
_INVERTED = 128  # of these, that a library inverts


def asymmetric_target(blocks: Tensor, drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """W + α·W·C·(H + Λ)⁻¹ for blocks of rows, as `plain_steps` of the kernels defines it, one block after the other.

    The solver rounds these in place of the weights: with α = 1 and but for the damping, the rounding then minimises the
    mean of ‖W x − Ŵ x̂‖², not ‖W x̂ − Ŵ x̂‖² (as in LoaQ, arXiv:2509.06297, and Qronos, arXiv:2505.11695).

    On a GPU products have bfloat16 operands: the correction, some per cent of the weights, is right to one or two per
    cent of itself.

    Args:
        blocks: W [B, rows, in], in the factor's dtype.
        drift: C [in, in], or W·C of the blocks, [B, rows, in].
        factor: Of H + Λ = A·D·Aᵀ, in the order of visits.
        alpha: Share of the correction.

    Returns:
        [B, rows, in].
    """
    order, upper, gain = factor.order[0], factor.rows[0], factor.gain[0]
    targets = torch.empty_like(blocks)
    if tensor_cores.usable(blocks):
        left, back = drift.bfloat16().mT[order] if drift.dim() == 2 else None, order.argsort()
        for number, (target, block) in enumerate(zip(targets, blocks, strict=True)):
            if left is None:
                x = drift[number].mT[order].contiguous()
            else:
                x = tensor_cores.product(left, block.bfloat16().mT)
            _substitute(upper, gain, x)
            torch.add(block, x[back].mT, alpha=alpha, out=target)
        return targets
    for number, (target, block) in enumerate(zip(targets, blocks, strict=True)):
        x = (block @ drift if drift.dim() == 2 else drift[number])[:, order]
        x = torch.linalg.solve_triangular(upper, x, upper=True, left=False, unitriangular=True).div_(gain)
        x = torch.linalg.solve_triangular(upper.mT, x, upper=False, left=False, unitriangular=True)
        target.index_copy_(1, order, x).mul_(alpha).add_(block)
    return targets


def _substitute(upper: Tensor, gain: Tensor, x: Tensor) -> None:
    """Overwrites x [n, rows], by position, with (A·D·Aᵀ)⁻¹ x; upper is Aᵀ.

    Triangles on the diagonal are inverted, and multiplied like the rest: a library's substitution goes row by row and
    takes ten times as long. Entries of their inverses are at most √(D_j / Λ_k).
    """
    n, inverses = len(x), [one.bfloat16() for one in _inverses(upper)]
    for number, start in enumerate(range(0, n, _SPAN)):
        here, after = slice(start, start + _SPAN), slice(start + _SPAN, n)
        x[here] = tensor_cores.product(inverses[number].mT, x[here].bfloat16())
        _subtract(x[after], upper[here, after].mT, x[here])
    x /= gain[:, None]
    for number, start in reversed(list(enumerate(range(0, n, _SPAN)))):
        here, before = slice(start, start + _SPAN), slice(0, start)
        x[here] = tensor_cores.product(inverses[number], x[here].bfloat16())
        _subtract(x[before], upper[before, here], x[here])


def _inverses(upper: Tensor) -> list[Tensor]:
    """The inverses of the triangles of `_SPAN` columns, or less, on the diagonal of a unit upper triangle."""
    starts = range(0, len(upper), _SPAN)
    triangles = torch.eye(_SPAN, dtype=upper.dtype, device=upper.device).repeat(len(starts), 1, 1)
    sizes = [min(_SPAN, len(upper) - start) for start in starts]
    for triangle, start, size in zip(triangles, starts, sizes, strict=True):
        triangle[:size, :size] = upper[start : start + size, start : start + size]
    return [inverse[:size, :size] for inverse, size in zip(_inverted(triangles), sizes, strict=True)]


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
    if len(x):
        tensor_cores.add_product(x[None], left.bfloat16()[None], solved.bfloat16()[None], alpha=-1)
