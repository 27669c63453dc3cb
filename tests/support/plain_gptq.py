"""GPTQ column by column in float64, written from the paper with an explicit inverse, and problems for it."""

from __future__ import annotations

import torch

from gptq_plugin.config import QuantizeConfig

ORDERS = {
    "static act-order": {"desc_act": False, "static_groups": True},
    "original act-order": {"desc_act": True, "static_groups": False},
    "natural order": {"desc_act": False, "static_groups": False},
    "AutoGPTQ's static act-order": {"desc_act": True, "static_groups": True},
}


def plain(**fields):
    """GPTQ as in the paper: the grid covers the whole range of its group."""
    return QuantizeConfig(**{"clip_ratios": (1.0,), **fields})


def plain_grid(columns, config):
    """Scale and zero of one group [rows, g], as floats a float16 checkpoint can hold."""
    top = 2**config.bits - 1
    if config.sym:
        scale = 2 * columns.abs().amax(1) / top
        zero = torch.full_like(scale, 2 ** (config.bits - 1))
    else:
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if config.checkpoint_format == "gptq":
            low = torch.minimum(low, -high / (top - 1))
        scale = (high - low) / top
        zero = torch.round(-low / scale).clamp(0, top)
    return scale.to(torch.float16).double(), zero


def plain_gptq(weight, hessian, config):
    """GPTQ as in arXiv:2210.17323: one column at a time, errors pushed forward through chol(H⁻¹). float64."""
    w, h = weight.double().clone(), hessian.double().clone()
    rows, n = w.shape
    size = n if config.group_size == -1 else config.group_size
    reorder = config.desc_act or config.static_groups
    perm = torch.argsort(h.diagonal(), descending=True, stable=True) if reorder else torch.arange(n)
    static = [plain_grid(w[:, g : g + size], config) for g in range(0, n, size)]
    w, h = w[:, perm], h[perm][:, perm]
    h.diagonal().add_(config.damp_percent * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes, dequantized = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(n):
        if config.static_groups:
            scale, zero = static[int(perm[j]) // size]
        elif j % size == 0:
            scale, zero = plain_grid(w[:, j : j + size], config)
        q = torch.round(w[:, j] / scale + zero).clamp(0, 2**config.bits - 1)
        codes[:, j], dequantized[:, j] = q, scale * (q - zero)
        error = (w[:, j] - dequantized[:, j]) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
    back = torch.argsort(perm)
    return codes[:, back].to(torch.uint8), dequantized[:, back]


def correlated(rows, n, seed=0):
    """A weight and the Hessian of inputs with strong correlations and very different scales."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5 + torch.eye(n, dtype=torch.float64)
    scales = torch.logspace(-1, 1, n, dtype=torch.float64)[torch.randperm(n, generator=g)]
    x = torch.randn(4 * n, n, generator=g, dtype=torch.float64) @ mix * scales
    return torch.randn(rows, n, generator=g, dtype=torch.float64) * 0.05, x.T @ x / len(x)
