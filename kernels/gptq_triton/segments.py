"""Sums of x xᵀ, or of x yᵀ, for segments of rows in one launch, in Triton; `plain_segments` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from .needs_triton import tl, triton
from .plain_segments import WIDTH
from .plain_sums import BITS
from .strips import Strips
from .sums import half_exponent, power_of_two, to_whole

_WIDTH = WIDTH  # columns of a tile, which is as high as a strip
_DEPTH = 64  # rows that are multiplied at a time
_WARPS = 8
_STAGES = 3
_MIRRORED = 64  # rows and columns of a tile that is copied


@triton.jit
def _add_products_kernel(
    totals, x, y, ends, of_x, of_y, n, size, stride_x, stride_y, across,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, LOWER: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    stop = tl.load(ends + segment)
    start = tl.load(ends + segment - 1, mask=segment > 0, other=0)
    t = tl.program_id(0)
    if LOWER:  # tile t of the lower triangle, row by row: row i has i + 1
        i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
        i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
        j = t - i * (i + 1) // 2
    else:
        i = t // across
        j = t % across
    if stop > start:
        a = i * WIDTH + tl.arange(0, WIDTH)
        b = j * WIDTH + tl.arange(0, WIDTH)
        k = tl.arange(0, DEPTH)
        left = x + (start + k).to(tl.int64)[:, None] * stride_x + a[None, :]
        right = y + (start + k).to(tl.int64)[:, None] * stride_y + b[None, :]
        total = tl.zeros([WIDTH, WIDTH], dtype=tl.float32)
        for first in range(0, stop - start, DEPTH):
            there = (first + k < stop - start)[:, None]
            if EVEN:
                mine = tl.load(left, mask=there, other=0.0)
                other = tl.load(right, mask=there, other=0.0)
            else:
                mine = tl.load(left, mask=there & (a < n)[None, :], other=0.0)
                other = tl.load(right, mask=there & (b < n)[None, :], other=0.0)
            total = tl.dot(tl.trans(mine), other, acc=total)
            left += DEPTH * stride_x
            right += DEPTH * stride_y
        inside = (a < n)[:, None] & (b < n)[None, :]
        base = totals + segment.to(tl.int64) * size
        if DIGITS:  # exact sums, those of a lower triangle in strips
            of_a = half_exponent(tl.load(of_x + segment.to(tl.int64) * n + a, mask=a < n, other=1.0)) - DIGITS
            of_b = half_exponent(tl.load(of_y + segment.to(tl.int64) * n + b, mask=b < n, other=1.0))
            step = n
            if LOWER:
                step = tl.minimum((i + 1) * WIDTH, n)
                base += WIDTH * WIDTH * (i * (i + 1) // 2)
                a -= i * WIDTH
            at = base + a.to(tl.int64)[:, None] * step + b[None, :]
            scaled = total.to(tl.float64) * power_of_two(-of_a)[:, None] * power_of_two(-of_b)[None, :]
            added = to_whole(scaled) * power_of_two(of_a)[:, None] * power_of_two(of_b)[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0.0) + added, mask=inside)
        else:
            at = base + a.to(tl.int64)[:, None] * n + b[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def add_products(totals: Tensor, x: Tensor, ends: Tensor) -> None:
    """`plain_segments.add_products` on a GPU, for rows in 16 bits, whose products are exact in float32.

    A tile across the diagonal is added whole; tiles above it are left as they are.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check_rows("x", x, x.shape[-1])
    _check(totals, ends, torch.float32, (x.shape[1], x.shape[1]))
    _launch(totals, x, x, ends, lower=True)


def add_cross_products(totals: Tensor, x: Tensor, y: Tensor, ends: Tensor) -> None:
    """`plain_segments.add_cross_products` on a GPU, for rows in 16 bits of one dtype.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check_pair(x, y)
    _check(totals, ends, torch.float32, (x.shape[1], x.shape[1]))
    _launch(totals, x, y, ends, lower=False)


def add_exact_products(totals: Tensor, x: Tensor, ends: Tensor) -> None:
    """`plain_segments.add_exact_products` on a GPU, for rows in 16 bits.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check_rows("x", x, x.shape[-1])
    _check(totals, ends, torch.float64, (Strips(x.shape[1], WIDTH).size,))
    energy = squares(x, ends)
    _launch(totals, x, x, ends, (energy, energy), lower=True)


def add_exact_cross_products(totals: Tensor, x: Tensor, y: Tensor, ends: Tensor) -> None:
    """`plain_segments.add_exact_cross_products` on a GPU, for rows in 16 bits of one dtype.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check_pair(x, y)
    _check(totals, ends, torch.float64, (x.shape[1], x.shape[1]))
    _launch(totals, x, y, ends, (squares(x, ends), squares(y, ends)), lower=False)


@triton.jit
def _squares_kernel(x, ends, out, n, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    segment = tl.program_id(1)
    stop = tl.load(ends + segment)
    start = tl.load(ends + segment - 1, mask=segment > 0, other=0)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = (c < n)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(start, stop, ROWS):
        r = first + tl.arange(0, ROWS)
        at = x + r.to(tl.int64)[:, None] * stride + c[None, :]
        value = tl.load(at, mask=there & (r < stop)[:, None], other=0.0).to(tl.float32)
        total += value * value
    tl.store(out + segment.to(tl.int64) * n + c, tl.sum(total, 0), mask=c < n)


def squares(x: Tensor, ends: Tensor) -> Tensor:
    """`plain_segments.squares` on a GPU, without a wait.

    Raises:
        ValueError: Wrong shape or stride.
    """
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be [rows, n] with contiguous rows, got {list(x.shape)}")
    if ends.dim() != 1 or ends.dtype != torch.int32 or not ends.is_contiguous():
        raise ValueError(f"ends must be contiguous int32 [segments], got {ends.dtype} {list(ends.shape)}")
    n = x.shape[1]
    out = torch.zeros(len(ends), n, dtype=torch.float32, device=x.device)
    if x.numel() and out.numel():
        _squares_kernel[(triton.cdiv(n, 64), len(ends))](x, ends, out, n, x.stride(0), ROWS=64, COLUMNS=64, num_warps=4)
    return out


def _launch(
    totals: Tensor, x: Tensor, y: Tensor, ends: Tensor, energies: tuple[Tensor, Tensor] | None = None, *, lower: bool
) -> None:
    """Adds the products, exactly where the sums of squares of the rows' columns are given."""
    if not x.numel() or not len(ends):
        return
    n = x.shape[1]
    across = triton.cdiv(n, _WIDTH)
    tiles = across * (across + 1) // 2 if lower else across**2
    _add_products_kernel[(tiles, len(ends))](
        totals, x, y, ends, *(energies or (None, None)), n, totals[0].numel(), x.stride(0), y.stride(0), across,
        WIDTH=_WIDTH, DEPTH=_DEPTH, EVEN=n % _WIDTH == 0, LOWER=lower, DIGITS=BITS if energies else 0,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip


def _check(totals: Tensor, ends: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    segments = len(totals)
    if totals.dtype != dtype or totals.shape[1:] != shape or not totals.is_contiguous():
        raise ValueError(
            f"totals must be contiguous {dtype} [E, {', '.join(map(str, shape))}], got {totals.dtype} "
            f"{list(totals.shape)}"
        )
    if ends.shape != (segments,) or ends.dtype != torch.int32 or not ends.is_contiguous():
        raise ValueError(f"ends must be contiguous int32 [{segments}], got {ends.dtype} {list(ends.shape)}")


def _check_rows(name: str, rows: Tensor, n: int) -> None:
    narrow = rows.dtype in (torch.float16, torch.bfloat16)
    if not narrow or rows.dim() != 2 or rows.shape[1] != n or (n > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"{name} must be float16 or bfloat16 [rows, {n}] with contiguous rows, got {rows.dtype} "
            f"{list(rows.shape)} with strides {list(rows.stride())}"
        )


def _check_pair(x: Tensor, y: Tensor) -> None:
    _check_rows("x", x, x.shape[-1])
    _check_rows("y", y, x.shape[-1])
    if x.dtype != y.dtype or len(x) != len(y):
        raise ValueError(f"x and y must be alike, got {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}")


@triton.jit
def _mirror_kernel(totals, n, WIDTH: tl.constexpr):
    base = totals + tl.program_id(2).to(tl.int64) * n * n
    r = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if tl.program_id(1) <= tl.program_id(0):
        there = (r < n)[:, None] & (c < n)[None, :] & (c[None, :] < r[:, None])
        value = tl.load(base + r.to(tl.int64)[:, None] * n + c[None, :], mask=there, other=0.0)
        tl.store(base + c.to(tl.int64)[None, :] * n + r[:, None], value, mask=there)


def symmetric_(totals: Tensor) -> Tensor:
    """`plain_segments.symmetric_` on a GPU, in one pass.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    segments, n, columns = totals.shape
    if totals.dtype != torch.float32 or columns != n or not totals.is_contiguous():
        raise ValueError(f"totals must be contiguous float32 [E, n, n], got {totals.dtype} {list(totals.shape)}")
    if totals.numel():
        across = triton.cdiv(n, _MIRRORED)
        _mirror_kernel[(across, across, segments)](totals, n, WIDTH=_MIRRORED)
    return totals


@triton.jit
def _zero_behind_kernel(rows, ends, segments, count, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    last = tl.load(ends + segments - 1)
    first = tl.program_id(0) * ROWS
    if first + ROWS > last:
        r = first + tl.arange(0, ROWS)
        behind = ((r >= last) & (r < count))[:, None]
        for start in range(0, n, COLUMNS):
            c = start + tl.arange(0, COLUMNS)
            at = rows + r.to(tl.int64)[:, None] * n + c[None, :]
            tl.store(at, tl.zeros([ROWS, COLUMNS], rows.dtype.element_ty), mask=behind & (c < n)[None, :])


def zero_behind_(rows: Tensor, ends: Tensor) -> Tensor:
    """`plain_segments.zero_behind_` on a GPU, which touches no other rows.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    if rows.dim() != 2 or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous [rows, n], got {list(rows.shape)}")
    if ends.dim() != 1 or not len(ends) or ends.dtype != torch.int32 or not ends.is_contiguous():
        raise ValueError(f"ends must be contiguous int32 [segments], got {ends.dtype} {list(ends.shape)}")
    if rows.numel():
        _zero_behind_kernel[(triton.cdiv(len(rows), 64),)](
            rows, ends, len(ends), *rows.shape, ROWS=64, COLUMNS=64, num_warps=4
        )
    return rows
