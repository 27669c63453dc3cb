"""The steps that improve rounded rows, in plain PyTorch: their definitions, one row at a time in float64 or any dtype.

`grid_errors` is also the CPU path. The others define what `gptq_plugin.gptq.refine` computes for many rows at once.
H is the mean of x xᵀ, w a row's target, s, z and q the scales, zeros and codes, and e = w − s·(q − z) its error; the
row's loss is e H eᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid_errors(targets: Tensor, scales: Tensor, zeros: Tensor, gain: Tensor, bits: int) -> Tensor:
    """Error of rounding targets to the nearest points of A grids, Σ_j gain_j·(t_j − Round(t_j))² for each group.

    Args:
        targets: [rows, in], groups contiguous.
        scales, zeros: [A, rows, G], the grids.
        gain: [in], the weights.
        bits: Width of a code.

    Returns:
        [A, rows, G], in the targets' dtype.
    """
    groups = targets.unflatten(1, (scales.shape[2], -1))
    weights, found = gain.view(scales.shape[2], -1), []
    for scale, zero in zip(scales[..., None], zeros[..., None], strict=True):
        q = (groups / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
        error = torch.sub(groups, q.sub_(zero).mul_(scale), out=q).square_()
        found.append(error.mul_(weights).sum(-1))
    return torch.stack(found)


def fitted_scales(weight: Tensor, hessian: Tensor, codes: Tensor, zeros: Tensor, group: Tensor) -> Tensor:
    """The scales of one row with the least loss for given codes.

    They solve M s = b, with M_gh = c_g H c_hᵀ, b_g = c_g H wᵀ, and c_g the row's q − z in group g and 0 elsewhere.

    Args:
        weight: [in].
        hessian: [in, in].
        codes: [in].
        zeros: [G].
        group: int64 [in].

    Returns:
        float64 [G]; M must be regular.
    """
    inside = torch.arange(len(zeros), device=group.device)[:, None] == group
    c = inside * (codes.double() - zeros.double()[group])
    return torch.linalg.solve(c @ hessian.double() @ c.T, c @ hessian.double() @ weight.double())


def descended_codes(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    order: Tensor,
    damping: Tensor,
    bits: int,
) -> Tensor:
    """The codes of one row after a sweep of coordinate descent.

    Each is rounded to q_j = Round(w_j + Σ_{k≠j} e_k·H_kj / (H_jj + Λ_j)), with the other columns' errors as they are.

    Args:
        weight: [in].
        hessian: [in, in].
        codes: [in].
        scales, zeros: [in], of each column's grid.
        order: int64 [in], the columns in the order of visits.
        damping: Λ [in].
        bits: Width of a code.

    Returns:
        float64 [in].
    """
    w, h, s, z, q = (t.double() for t in (weight, hessian, scales, zeros, codes))
    q = q.clone()
    for j in order.tolist():
        e = w - s * (q - z)
        e[j] = 0
        target = w[j] + e @ h[j] / (h[j, j] + damping[j].double())
        q[j] = (target / s[j] + z[j]).round().clamp(0, 2**bits - 1)
    return q


def asymmetric_target(weight: Tensor, hessian: Tensor, drift: Tensor, damping: Tensor, alpha: float) -> Tensor:
    """The weights that give the float model's outputs from the quantized model's inputs: W + α·W·C·(H + Λ)⁻¹.

    With α = 1 they minimise the mean of ‖W x − W* x̂‖² over tokens, but for the damping: x is a token's input in the
    float model, x̂ in the model quantized so far, and C the mean of (x − x̂) x̂ᵀ.

    Args:
        weight: [out, in].
        hessian: [in, in], the mean of x̂ x̂ᵀ.
        drift: C [in, in].
        damping: Λ [in].
        alpha: Share of the correction.

    Returns:
        float64 [out, in].
    """
    damped = hessian.double() + damping.double().diag()
    return weight.double() + alpha * torch.linalg.solve(damped, weight.double() @ drift.double(), left=False)
