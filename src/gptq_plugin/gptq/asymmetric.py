"""Weights that make up for what the quantized layers before a layer did to its inputs: `asymmetric_target`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.gptq import tensor_cores
from gptq_plugin.gptq.factor import Factor

_SPAN = 512  # positions that a library's substitution solves; products push them to the others
_STRIP = 1024  # channels per product of weights and drift
_SCALE = 2.0**12  # in `tensor_cores`, of numbers below 1


def asymmetric_target(blocks: Tensor, drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """W + α·W·C·(H + Λ)⁻¹ for blocks of rows, as `plain_steps` of the kernels defines it, one block after the other.

    The solver rounds these in place of the weights: with α = 1 and but for the damping, the rounding then minimises the
    mean of ‖W x − Ŵ x̂‖², not ‖W x̂ − Ŵ x̂‖² (as in LoaQ, arXiv:2509.06297, and Qronos, arXiv:2505.11695).

    Args:
        blocks: W [B, rows, in], in the factor's dtype.
        drift: C [in, in].
        factor: Of H + Λ = A·D·Aᵀ, in the order of visits.
        alpha: Share of the correction.

    Returns:
        [B, rows, in].
    """
    order, upper, gain = factor.order[0], factor.rows[0], factor.gain[0]
    targets = torch.empty_like(blocks)
    if tensor_cores.usable(blocks):
        unit = tensor_cores.unit_above(drift)
        left = drift.mT[order].div_(unit)
        for target, block in zip(targets, blocks, strict=True):
            of_rows = tensor_cores.unit_above(block, 1)
            x = _product(left, (block / of_rows[:, None]).mT.contiguous())
            _substitute(upper, gain, x)
            x.mul_(of_rows).mul_(alpha * unit)
            target.mT.index_copy_(0, order, x).add_(block.mT)
        return targets
    for target, block in zip(targets, blocks, strict=True):
        x = (block @ drift)[:, order]
        x = torch.linalg.solve_triangular(upper, x, upper=True, left=False, unitriangular=True).div_(gain)
        x = torch.linalg.solve_triangular(upper.mT, x, upper=False, left=False, unitriangular=True)
        target.index_copy_(1, order, x).mul_(alpha).add_(block)
    return targets


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of numbers below 1, on tensor cores."""
    out = left.new_zeros(1, len(left), right.shape[1])
    for start in range(0, len(right), _STRIP):
        here = slice(start, start + _STRIP)
        a = tensor_cores.left_operand(left[None, :, here], _SCALE)
        b = tensor_cores.right_operand(right[None, here], _SCALE)
        tensor_cores.add_product(out, a, b, alpha=_SCALE**-2)
    return out[0]


def _substitute(upper: Tensor, gain: Tensor, x: Tensor) -> None:
    """Overwrites x [n, rows], by position, with (A·D·Aᵀ)⁻¹ x; upper is Aᵀ. Its large products are on tensor cores."""
    n = len(x)
    for start in range(0, n, _SPAN):
        here, after = slice(start, start + _SPAN), slice(start + _SPAN, n)
        solved = torch.linalg.solve_triangular(upper[here, here].mT, x[here], upper=False, unitriangular=True)
        if after.start < n:
            left, _ = tensor_cores.gram_operands(upper[None, here, after], 1.0)
            _subtract(x[after], left, solved)
        x[here] = solved
    x /= gain[:, None]
    for start in reversed(range(0, n, _SPAN)):
        here, before = slice(start, start + _SPAN), slice(0, start)
        solved = torch.linalg.solve_triangular(upper[here, here], x[here], upper=True, unitriangular=True)
        if start:
            _subtract(x[before], tensor_cores.left_operand(upper[None, before, here], 1.0), solved)
        x[here] = solved


def _subtract(x: Tensor, left: Tensor, solved: Tensor) -> None:
    """x −= left @ solved, for the left operand of a product on tensor cores and numbers of any size."""
    unit = tensor_cores.unit_above(solved)
    product = torch.zeros_like(x)[None]
    scaled = (solved / unit).contiguous()  # cuBLAS solves in columns
    right = tensor_cores.right_operand(scaled[None], _SCALE)
    tensor_cores.add_product(product, left, right, alpha=1 / _SCALE)
    x -= product[0].mul_(unit)
