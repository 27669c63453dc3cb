"""Sums of x xᵀ, or of x yᵀ, for segments of rows, such as those of experts, in plain PyTorch: the definition.

Sums in float64 are exact, as `plain_sums` makes them: a call is one product of each segment, in float32.

Tested by tests/kernels/test_segments.py: with the Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plain_sums import add_product
from .strips import Strips

WIDTH = 128  # rows of a strip of exact sums
_STRIP = 1024  # rows of a product, or columns that are copied, at a time


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


def add_exact_products(totals: Tensor, x: Tensor, ends: Tensor) -> None:
    """Adds XᵀX of each segment of rows to its total, so that the order of calls does not matter.

    Args:
        totals: float64 [E, size], in `Strips` of WIDTH rows; added to.
        x: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    strips, start, energy = Strips(x.shape[1], WIDTH), 0, squares(x, ends)
    for total, own, stop in zip(totals, energy, ends.tolist(), strict=True):
        rows = x[start:stop].float()
        for strip, (first, last) in zip(strips.of(total), strips.bounds, strict=True):
            product = rows[:, first:last].T @ rows[:, :last]
            add_product(strip, product, own, first)
        start = stop


def add_exact_cross_products(totals: Tensor, x: Tensor, y: Tensor, ends: Tensor) -> None:
    """Adds XᵀY of each segment of rows to its total, so that the order of calls does not matter.

    Args:
        totals: float64 [E, n, n]; added to.
        x, y: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    start, n, energy = 0, y.shape[1], torch.cat([squares(y, ends), squares(x, ends)], 1)
    for total, own, stop in zip(totals, energy, ends.tolist(), strict=True):
        rows, others = x[start:stop].float(), y[start:stop].float()
        for first in range(0, n, _STRIP):  # to round a product takes five times its memory
            last = first + _STRIP
            add_product(total[first:last], rows[:, first:last].T @ others, own, n + first)
        start = stop


def squares(x: Tensor, ends: Tensor) -> Tensor:
    """Sums of squares of each segment's columns, float32 [E, n], each the same whatever other segments are beside it.

    Args:
        x: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    found, start = torch.zeros(len(ends), x.shape[1], dtype=torch.float32, device=x.device), 0
    for own, stop in zip(found, ends.tolist(), strict=True):
        own.copy_(x[start:stop].float().square().sum(0))
        start = stop
    return found


def symmetric_(totals: Tensor) -> Tensor:
    """Copies what is below the diagonals of [E, n, n] above them, in place; returns the totals."""
    for start in range(0, totals.shape[1], _STRIP):
        stop = start + _STRIP
        corner = totals[:, start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        totals[:, start:stop, stop:] = totals[:, stop:, start:stop].mT
    return totals


def zero_behind_(rows: Tensor, ends: Tensor) -> Tensor:
    """Sets the rows, [rows, n], behind the last end to 0, in place, without a wait for the device; returns them."""
    behind = torch.arange(len(rows), device=rows.device) >= ends[-1]
    return rows.masked_fill_(behind[:, None], 0)
