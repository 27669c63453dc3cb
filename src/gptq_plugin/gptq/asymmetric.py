"""Weights that make up for what the quantized layers before a layer did to its inputs: `asymmetric_target`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin.gptq.factor import Factor


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
    for target, block in zip(targets, blocks, strict=True):
        x = (block @ drift)[:, order]
        x = torch.linalg.solve_triangular(upper, x, upper=True, left=False, unitriangular=True).div_(gain)
        x = torch.linalg.solve_triangular(upper.mT, x, upper=False, left=False, unitriangular=True)
        target.index_copy_(1, order, x).mul_(alpha).add_(block)
    return targets
