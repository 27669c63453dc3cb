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
    for total, own in zip(totals, rows_of_each(x, ends), strict=True):
        rows = own.float()
        total.addmm_(rows.T, rows)


def add_cross_products(totals: Tensor, x: Tensor, y: Tensor, ends: Tensor) -> None:
    """Adds XᵀY of each segment of rows to its total.

    Args:
        totals: float32 [E, n, n]; added to.
        x, y: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    for total, rows, others in zip(totals, rows_of_each(x, ends), rows_of_each(y, ends), strict=True):
        total.addmm_(rows.float().T, others.float())


def add_exact_products(totals: Tensor, x: Tensor, ends: Tensor) -> None:
    """Adds XᵀX of each segment of rows to its total, so that the order of calls does not matter.

    Args:
        totals: float64 [E, size], in `Strips` of WIDTH rows; added to.
        x: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    strips = Strips(x.shape[1], WIDTH)
    for total, energy, own in zip(totals, squares(x, ends), rows_of_each(x, ends), strict=True):
        rows = own.float()
        for strip, (first, last) in zip(strips.of(total), strips.bounds, strict=True):
            product = rows[:, first:last].T @ rows[:, :last]
            add_product(strip, product, energy, first)


def add_exact_cross_products(totals: Tensor, x: Tensor, y: Tensor, ends: Tensor) -> None:
    """Adds XᵀY of each segment of rows to its total, so that the order of calls does not matter.

    Args:
        totals: float64 [E, n, n]; added to.
        x, y: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    n, energies = y.shape[1], torch.cat([squares(y, ends), squares(x, ends)], 1)
    for total, energy, *own in zip(totals, energies, rows_of_each(x, ends), rows_of_each(y, ends), strict=True):
        rows, others = (one.float() for one in own)
        for first in range(0, n, _STRIP):  # to round a product takes five times its memory
            last = first + _STRIP
            add_product(total[first:last], rows[:, first:last].T @ others, energy, n + first)


def squares(x: Tensor, ends: Tensor) -> Tensor:
    """Sums of squares of each segment's columns, float32 [E, n], each the same whatever other segments are beside it.

    Args:
        x: [rows, n]; rows behind the last end are left out.
        ends: Where segments end, int32 [E].
    """
    found = torch.zeros(len(ends), x.shape[1], dtype=torch.float32, device=x.device)
    for own, rows in zip(found, rows_of_each(x, ends), strict=True):
        own.copy_(rows.float().square().sum(0))
    return found


def rows_of_each(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """Each segment's rows of x, [rows, n], as views. Waits for the device."""
    sizes: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return x[: sum(sizes)].split(sizes)


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
