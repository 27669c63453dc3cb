"""Weights that make up for what the quantized layers before a layer did to its inputs: `asymmetric_target`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.gptq import tensor_cores
from gptq_plugin.gptq.factor import Factor

_SPAN = 1024  # positions that a library's substitution solves; products push them to the others
_SCALE = 2.0**12  # in `tensor_cores`, of numbers below 1


def asymmetric_target(blocks: Tensor, drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """W + α·W·C·(H + Λ)⁻¹ for blocks of rows, as `plain_steps` of the kernels defines it, one block after the other.

    The solver rounds these in place of the weights: with α = 1 and but for the damping, the rounding then minimises the
    mean of ‖W x − Ŵ x̂‖², not ‖W x̂ − Ŵ x̂‖² (as in LoaQ, arXiv:2509.06297, and Qronos, arXiv:2505.11695).

    On a GPU large products have float16 operands: the correction, some per cent of the weights, is right to .1 %.

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
            right = tensor_cores.narrowed((block / of_rows[:, None]).mT, _SCALE)
            x = tensor_cores.product(tensor_cores.narrowed(left, _SCALE), right)
            _substitute(upper, gain, x)
            x.mul_(of_rows * unit * (alpha * _SCALE**-2))
            target.mT.index_copy_(0, order, x).add_(block.mT)
        return targets
    for target, block in zip(targets, blocks, strict=True):
        x = (block @ drift)[:, order]
        x = torch.linalg.solve_triangular(upper, x, upper=True, left=False, unitriangular=True).div_(gain)
        x = torch.linalg.solve_triangular(upper.mT, x, upper=False, left=False, unitriangular=True)
        target.index_copy_(1, order, x).mul_(alpha).add_(block)
    return targets


def _substitute(upper: Tensor, gain: Tensor, x: Tensor) -> None:
    """Overwrites x [n, rows], by position, with (A·D·Aᵀ)⁻¹ x; upper is Aᵀ."""
    n = len(x)
    for start in range(0, n, _SPAN):
        here, after = slice(start, start + _SPAN), slice(start + _SPAN, n)
        solved = torch.linalg.solve_triangular(upper[here, here].mT, x[here], upper=False, unitriangular=True)
        _subtract(x[after], upper[here, after].mT, solved)
        x[here] = solved
    x /= gain[:, None]
    for start in reversed(range(0, n, _SPAN)):
        here, before = slice(start, start + _SPAN), slice(0, start)
        solved = torch.linalg.solve_triangular(upper[here, here], x[here], upper=True, unitriangular=True)
        _subtract(x[before], upper[before, here], solved)
        x[here] = solved


def _subtract(x: Tensor, left: Tensor, solved: Tensor) -> None:
    """x −= left @ solved on tensor cores, for a part of the factor and numbers of any size."""
    if len(x):
        unit = tensor_cores.unit_above(solved)
        right = tensor_cores.narrowed(solved, _SCALE / unit)
        x.addcmul_(tensor_cores.product(tensor_cores.narrowed(left, 1.0), right), unit / _SCALE, value=-1)
