"""Sums of products that do not depend on the order of addition, in Triton; `plain_sums` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from .needs_triton import tl, triton
from .plain_sums import BITS

_COLUMNS = 2048  # per program


@triton.jit
def half_exponent(diagonal):
    return (((diagonal.to(tl.int32, bitcast=True) >> 23) & 255) - 125) >> 1


@triton.jit
def power_of_two(exponent):
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def to_whole(value):
    """Half to even, as torch.round: at 1.5·2^52 the spacing of float64 is 1."""
    return (value + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _add_product_kernel(total, product, diagonal, columns, first, DIGITS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = c < columns
    at = row * columns + c
    value = tl.load(product + at, mask=there, other=0.0).to(tl.float64)
    exponent = half_exponent(tl.load(diagonal + c, mask=there, other=1.0))
    exponent += half_exponent(tl.load(diagonal + first + row)) - DIGITS
    rounded = to_whole(value * power_of_two(-exponent))
    sum_ = tl.load(total + at, mask=there, other=0.0) + rounded * power_of_two(exponent)
    tl.store(total + at, sum_, mask=there)


def add_product(total: Tensor, product: Tensor, diagonal: Tensor, first: int) -> None:
    """`plain_sums.add_product` on a GPU, in one pass; all tensors contiguous.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    rows, columns = product.shape
    for name, tensor, dtype in (
        ("total", total, torch.float64),
        ("product", product, torch.float32),
        ("diagonal", diagonal, torch.float32),
    ):
        fits = len(tensor) >= max(columns, first + rows) if name == "diagonal" else tensor.shape == product.shape
        if tensor.dtype != dtype or not tensor.is_contiguous() or not fits:
            raise ValueError(
                f"{name} must be contiguous {dtype} and fit rows {first} to {first + rows} of {columns} columns, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    if product.numel():
        grid = (rows, triton.cdiv(columns, _COLUMNS))
        _add_product_kernel[grid](total, product, diagonal, columns, first, DIGITS=BITS, COLUMNS=_COLUMNS, num_warps=8)
