"""The steps that improve rounded rows, in plain PyTorch.

`taken` and the four behind it are the CPU path, for many rows of B matrices at once, [B, n, rows]; `steps` has those
four in Triton. The others define what `gptq_plugin.gptq.refine` makes of them, one row at a time in float64 or any
dtype. H is the mean of x xᵀ, w a row's target, s, z and q the scales, zeros and codes, and e = w − s·(q − z) its error;
the row's loss is e H eᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def taken(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each matrix of [B, m, width] by their numbers, int64 [B, k]: [B, k, width]."""
    first = torch.arange(0, len(values) * values.shape[1], values.shape[1], device=index.device)
    return values.flatten(0, 1)[(index + first[:, None]).flatten()].unflatten(0, index.shape)


def rounding_errors(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, channel: Tensor
) -> Tensor:
    """Errors w − s·(q − z) of the channels in some order.

    Args:
        weight: [B, n, rows], by channel.
        codes: uint8 [B, n, rows], by channel.
        scales, zeros: [B, G, rows].
        group: int64 [B, n], of every channel.
        channel: int64 [B, n], the order.

    Returns:
        [B, n, rows], in that order.
    """
    grid = group.gather(1, channel)
    rounded = (taken(codes, channel).to(scales.dtype) - taken(zeros, grid)).mul_(taken(scales, grid))
    return torch.sub(taken(weight, channel), rounded, out=rounded)


def grid_errors(targets: Tensor, channel: Tensor, scales: Tensor, zeros: Tensor, gain: Tensor, bits: int) -> Tensor:
    """Error of rounding targets to the nearest points of A grids, Σ_j gain_j·(t_j − Round(t_j))² for each group.

    Args:
        targets: [B, n, rows].
        channel: int64 [B, n], which of them are the first group's, the second's and so on.
        scales, zeros: [A, B, G, rows], the grids.
        gain: [B, n], the weights.
        bits: Width of a code.

    Returns:
        [A, B, G, rows], in the targets' dtype.
    """
    groups = taken(targets, channel).mT.contiguous().unflatten(2, (scales.shape[2], -1))  # [B, rows, G, size]
    weights, found = gain.gather(1, channel).view(len(gain), 1, scales.shape[2], -1), []
    for scale, zero in zip(scales.mT[..., None], zeros.mT[..., None], strict=True):
        q = (groups / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
        error = torch.sub(groups, q.sub_(zero).mul_(scale), out=q).square_()
        found.append(error.mul_(weights).sum(-1).mT)
    return torch.stack(found)


def grouped_hessian(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Hessians as `scale_equations` reads them, and a factor of each, [B].

    Args:
        hessian: [B, n, n]; first the channels of the first group, then those of the second and so on.
    """
    return hessian, hessian.new_ones(len(hessian))


def scale_equations(
    hessian: tuple[Tensor, Tensor], codes: Tensor, zeros: Tensor, errors: Tensor, channel: Tensor, some: slice
) -> tuple[Tensor, Tensor]:
    """M and b of the loss as a function of a change d of the scales, e H eᵀ − 2 b·d + d M dᵀ.

    M_gh = c_g H c_hᵀ and b_g = c_g H eᵀ, with c_g the row's q − z in group g and 0 elsewhere.

    Args:
        hessian: From `grouped_hessian`, for this order of channels.
        codes: uint8 [B, n, rows], by channel.
        zeros: [B, G, rows].
        errors: [B, n, rows], group by group.
        channel: int64 [B, n], the channels group by group.
        some: The rows wanted.

    Returns:
        float64 [B, some, G, G] and [B, some, G].
    """
    (whole, unit), groups = hessian, zeros.shape[1]
    size = errors.shape[1] // groups
    errors = errors[:, :, some]
    centred = taken(codes[:, :, some], channel).to(errors.dtype) - zeros[:, :, some].repeat_interleave(size, 1)
    right = (centred * (whole @ errors)).unflatten(1, (groups, size)).sum(2).mT
    matrix = right.new_zeros(*right.shape[:2], groups, groups, dtype=torch.float64)
    for group in range(groups):
        start, stop = group * size, (group + 1) * size
        product = (whole[:, :stop, start:stop] @ centred[:, start:stop]).mul_(centred[:, :stop])
        matrix[:, :, group, : group + 1] = product.unflatten(1, (group + 1, size)).sum(2).mT
        matrix[:, :, :group, group] = matrix[:, :, group, :group]
    return matrix.mul_(unit[:, None, None, None]), right.double().mul_(unit[:, None, None])


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
