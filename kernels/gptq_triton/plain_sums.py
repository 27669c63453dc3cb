"""Sums of products XᵀX that do not depend on the order in which they are added, in plain PyTorch: the definition.

Numbers that are multiples of one quantum add up exactly in float64, in any order, while their sum stays below 2^53
quanta. So every entry (i, j) of a product is first rounded to a multiple of u_i·u_j·2^-BITS, where u_i is the power of
two next above the root of the product's own diagonal entry i; by Cauchy-Schwarz the entry is at most u_i·u_j. That
costs 2^-27 of √(d_i·d_j), less than a float32 product is off by, and depends on nothing but the product. S products
add up exactly as long as no channel's energy in one of them is 2^23 / S times that in another; beyond that a sum is
off by 2^-53, which shows in float32 once in 2^29 entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 28


def add_product(total: Tensor, product: Tensor, diagonal: Tensor, first: int) -> None:
    """Adds rows of a product XᵀX to a total, after rounding them as above.

    Args:
        total: float64 [rows, columns]; added to.
        product: float32 [rows, columns]: rows first, first + 1, ... of the whole product.
        diagonal: float32 [columns or more], of the whole product; 0 and above, or NaN.
        first: Row of the whole product that is the first here.
    """
    rows, columns = product.shape
    above, left = _exponents(diagonal[:columns]), _exponents(diagonal[first : first + rows]) - BITS
    quantum = _power_of_two(left)[:, None] * _power_of_two(above)
    total.addcmul_((product / quantum).round_(), quantum)


def _power_of_two(exponents: Tensor) -> Tensor:
    return (exponents.long() + 1023 << 52).view(torch.float64)


def _exponents(diagonal: Tensor) -> Tensor:
    """The least k with √d <= 2^k for normal numbers d, int32, by d's own exponent."""
    exponents = (diagonal.contiguous().view(torch.int32) >> 23 & 255) - 126
    return (exponents + 1) >> 1
