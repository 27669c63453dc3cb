"""Sums of x xᵀ, or of x yᵀ, for segments of rows, such as those of experts, in plain PyTorch: the definition.

Tested by tests/kernels/test_segments.py: with the Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_products(totals: Tensor, x: Tensor, ends: Tensor) -> None:
    """Adds XᵀX of each segment of rows to its total: on and below the diagonal, and anything above it.

    Args:
        totals: float32 [E, n, n]; added to.
        x: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    start = 0
    for total, stop in zip(totals, ends.tolist(), strict=True):
        rows = x[start:stop].float()
        total.addmm_(rows.T, rows)
        start = stop


def add_cross_products(totals: Tensor, x: Tensor, y: Tensor, ends: Tensor) -> None:
    """Adds XᵀY of each segment of rows to its total.

    Args:
        totals: float32 [E, n, n]; added to.
        x, y: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    start = 0
    for total, stop in zip(totals, ends.tolist(), strict=True):
        total.addmm_(x[start:stop].float().T, y[start:stop].float())
        start = stop


def symmetric_(totals: Tensor) -> Tensor:
    """Copies what is below the diagonals of [E, n, n] above them, in place; returns the totals."""
    totals.copy_(totals.tril() + totals.tril(-1).mT)
    return totals


def zero_behind_(rows: Tensor, ends: Tensor) -> Tensor:
    """Sets the rows, [rows, n], behind the last end to 0, in place, without a wait for the device; returns them."""
    behind = torch.arange(len(rows), device=rows.device) >= ends[-1]
    return rows.masked_fill_(behind[:, None], 0)
