"""Passes over rows that read them once, in Triton; `plain_rows` defines them."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .needs_triton import libdevice, tl, triton

_ROWS = 8
_COLUMNS = 512  # of a tile
_GATED = 256  # columns of a tile of `silu_gated`, which divide most widths
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _largest_kernel(
    largest, x, ends, segments, rows, width, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = x + r.to(tl.int64)[:, None] * stride
    most = tl.full([ROWS, COLUMNS], -1.0, tl.float32)
    nan = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, width, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        there = (r < rows)[:, None] & (c < width)[None, :]
        value = tl.abs(tl.load(base + c[None, :], mask=there, other=0.0).to(tl.float32))
        nan |= (value != value).to(tl.int32)
        most = tl.where(there & (value > most), value, most)
    of_rows = tl.where(tl.max(nan, 1) > 0, -1.0, tl.max(most, 1))
    if SEGMENTS:
        segment = tl.zeros([ROWS], tl.int32)
        for first in range(0, segments, SEGMENTS):
            s = first + tl.arange(0, SEGMENTS)
            end = tl.load(ends + s, mask=s < segments, other=2**31 - 1)
            segment += tl.sum((end[None, :] <= r[:, None]).to(tl.int32), 1)
        counts = segment < segments
        known = tl.load(largest + segment, mask=counts, other=0.0)  # perhaps by now more: nothing is lost by that
        tl.atomic_max(largest + segment, of_rows, mask=counts & (of_rows > known), sem="relaxed")
    else:
        of_all = tl.max(of_rows, 0)
        if of_all > tl.load(largest):
            tl.atomic_max(largest, of_all, sem="relaxed")


def include_largest_(largest: Tensor, x: Tensor, ends: Tensor | None = None) -> None:
    """`plain_rows.include_largest_` on a GPU, without a tensor of the rows.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check("x", x, 2)
    if largest.dtype != torch.float32 or not largest.is_contiguous() or (ends is None and largest.numel() != 1):
        raise ValueError(f"largest must be contiguous float32 [segments], got {largest.dtype} {list(largest.shape)}")
    if ends is not None and (ends.shape != largest.shape or ends.dtype != torch.int32 or not ends.is_contiguous()):
        raise ValueError(f"ends must be contiguous int32 {list(largest.shape)}, got {ends.dtype} {list(ends.shape)}")
    if not x.numel() or not len(largest):
        return
    segments = 0 if ends is None else min(128, max(16, triton.next_power_of_2(len(ends))))
    with _on(x):
        _largest_kernel[(triton.cdiv(len(x), _ROWS),)](
            largest, x, largest if ends is None else ends, len(largest), *x.shape, x.stride(0),
            ROWS=_ROWS, COLUMNS=_COLUMNS, SEGMENTS=segments, num_warps=4,
        )  # fmt: skip


@triton.jit
def _row_products_kernel(
    totals, x, y, rows, width, x_batch, x_row, y_batch, y_row, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    left = x + b * x_batch + r.to(tl.int64)[:, None] * x_row
    right = y + b * y_batch + r.to(tl.int64)[:, None] * y_row
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        there = (r < rows)[:, None] & (c < width)[None, :]
        mine = tl.load(left + c[None, :], mask=there, other=0.0).to(tl.float32)
        total += mine * tl.load(right + c[None, :], mask=there, other=0.0).to(tl.float32)
    at = totals + b * rows + r
    before = tl.load(at, mask=r < rows, other=0.0)
    tl.store(at, before + factor * tl.sum(total, 1), mask=r < rows)


def add_row_products_(totals: Tensor, x: Tensor, y: Tensor, factor: float = 1.0) -> None:
    """`plain_rows.add_row_products_` on a GPU, in float32 without a rounding between.

    Args:
        totals: float32 [rows] or [B, rows], contiguous.
        x, y: As there; the last dimension is contiguous.
        factor: As there.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check("x", x, x.dim())
    _check("y", y, x.dim())
    if x.shape != y.shape or x.shape[:-1] != totals.shape or totals.dim() not in (1, 2):
        raise ValueError(f"need [B, rows] and twice [B, rows, width], got {totals.shape}, {x.shape} and {y.shape}")
    if totals.dtype != torch.float32 or not totals.is_contiguous():
        raise ValueError(f"totals must be contiguous float32, got {totals.dtype} with strides {totals.stride()}")
    if not x.numel():
        return
    batch, rows = totals.shape if totals.dim() == 2 else (1, len(totals))
    strides = [(one.stride(0) if one.dim() == 3 else 0, one.stride(-2)) for one in (x, y)]
    with _on(x):
        _row_products_kernel[(triton.cdiv(rows, _ROWS), batch)](
            totals, x, y, rows, x.shape[-1], *strides[0], *strides[1], factor,
            ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip


@triton.jit
def _silu_gated_kernel(
    both, out, rows, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (r < rows)[:, None] & (c < width)[None, :]
    at = both + r[:, None] * stride + c[None, :]
    gate = tl.load(at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=there, other=0.0).to(tl.float32)
    if INTERPRETED:
        raised = tl.exp(-gate)
    else:
        raised = libdevice.exp(-gate)  # as PyTorch's; that of Triton is off by some units in the last place
    value = tl.div_rn(gate, 1.0 + raised).to(out.dtype.element_ty).to(tl.float32) * up
    tl.store(out + r[:, None] * width + c[None, :], value.to(out.dtype.element_ty), mask=there)


def silu_gated(both: Tensor) -> Tensor:
    """`plain_rows.silu_gated` on a GPU, of the same values.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check("both", both, 2)
    rows, width = both.shape[0], both.shape[1] // 2
    if both.shape[1] % 2:
        raise ValueError(f"a gate and up have as many columns, got {both.shape[1]} of both")
    out = both.new_empty(rows, width)
    if out.numel():
        with _on(both):
            _silu_gated_kernel[(triton.cdiv(rows, 2 * _ROWS), triton.cdiv(width, _GATED))](
                both, out, rows, width, both.stride(0), ROWS=2 * _ROWS, COLUMNS=_GATED,
                INTERPRETED=not both.is_cuda, num_warps=4,
            )  # fmt: skip
    return out


def _check(name: str, rows: Tensor, dims: int) -> None:
    if rows.dtype not in _DTYPES or rows.dim() != dims or (rows.shape[-1] > 1 and rows.stride(-1) != 1):
        raise ValueError(
            f"{name} must be float16, bfloat16 or float32 with {dims} dimensions and contiguous rows, got {rows.dtype} "
            f"{list(rows.shape)} with strides {list(rows.stride())}"
        )


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
