"""The solver's passes over whole matrices around the recursion, in Triton; `reference` defines them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .needs_triton import tl, triton

_SCORED_ROWS = 16
_SCORED_COLUMNS = 128
_SPLIT_COLUMNS = 2048
_ROUNDED_COLUMNS = 1024


@triton.jit
def _permuted_kernel(matrices, order, factors, out, n, COLUMNS: tl.constexpr):
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    order += b * n
    factor = tl.load(factors + b)
    source = matrices + (b * n + tl.load(order + row)) * n
    target = out + (b * n + row) * n
    for first in range(0, n, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        there = c < n
        value = tl.load(source + tl.load(order + c, mask=there, other=0), mask=there)
        tl.store(target + c, value * factor, mask=there)


def permute(matrices: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """`reference.permute` on a GPU, in float32.

    Raises:
        ValueError: The shapes do not match.
    """
    batch, n, columns = matrices.shape
    if columns != n or order.shape != (batch, n) or factors.shape != (batch,):
        raise ValueError(
            f"need [B, n, n], [B, n] and [B], got {list(matrices.shape)}, {list(order.shape)} and {list(factors.shape)}"
        )
    matrices, order, factors = matrices.contiguous(), order.contiguous(), factors.contiguous()
    out = torch.empty_like(matrices)
    if out.numel():
        # Few programs at a time: their rows, which are gathered from, stay in the cache.
        _permuted_kernel[(n, batch)](matrices, order, factors, out, n, COLUMNS=4096, num_warps=16)
    return out


@triton.jit
def _split_kernel(
    x, out, columns, x_batch, x_row, out_batch, out_row, out_piece, scale,
    PIECES: tl.constexpr, LOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    there = c < columns
    value = tl.load(x + b * x_batch + row * x_row + c, mask=there) * scale
    high = value.to(tl.float16)
    low = (value - high.to(tl.float32)).to(tl.float16)
    target = out + b * out_batch + row * out_row + c
    for piece in tl.static_range(PIECES):
        if piece == LOW:
            tl.store(target + piece * out_piece, low, mask=there)
        else:
            tl.store(target + piece * out_piece, high, mask=there)


def split_to_float16(x: Tensor, scale: float, pieces: str, dim: int) -> Tensor:
    """`reference.split_to_float16` on a GPU, in one pass; the last dimension of x is contiguous.

    Raises:
        ValueError: Wrong dtype or layout, or not exactly one piece is "l".
    """
    if x.dtype != torch.float32 or x.dim() != 3 or (x.shape[2] > 1 and x.stride(2) != 1):
        raise ValueError(
            f"x must be float32 [B, rows, columns] with contiguous rows, got {x.dtype} {list(x.shape)} with strides "
            f"{list(x.stride())}"
        )
    if pieces.count("l") != 1 or pieces.strip("hl") or dim not in (1, 2):
        raise ValueError(f"pieces must be h's and one l, and dim 1 or 2; got {pieces!r} and {dim}")
    batch, rows, columns = x.shape
    shape = [batch, rows, columns]
    shape[dim] *= len(pieces)
    out = torch.empty(shape, dtype=torch.float16, device=x.device)
    if out.numel():
        block = min(_SPLIT_COLUMNS, triton.next_power_of_2(columns))
        _split_kernel[(rows, batch, triton.cdiv(columns, block))](
            x, out, columns, x.stride(0), x.stride(1), out.stride(0), columns * (len(pieces) if dim == 2 else 1),
            columns * (rows if dim == 1 else 1), scale, PIECES=len(pieces), LOW=pieces.index("l"), COLUMNS=block,
        )  # fmt: skip
    return out


@triton.jit
def _clipping_errors_kernel(
    weight, scales, zeros, spread, gain, parts, alternatives, rows, groups, size, each,
    TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    g = tl.program_id(1)
    inside = r < rows
    row_weight = weight + (r * groups + g)[:, None] * size
    step = tl.load(scales + r * groups + g, mask=inside, other=1.0)
    for a in range(alternatives):
        at = (a * rows + r) * groups + g
        scale = tl.load(scales + at, mask=inside, other=1.0)
        zero = tl.load(zeros + at, mask=inside, other=0.0)
        total = tl.zeros([ROWS], dtype=tl.float32)
        for first in range(0, size, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            there = c < size
            w = tl.load(row_weight + c[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            if SHARED:
                apart = tl.load(spread + g * size + c, mask=there, other=0.0)[None, :]
                share = tl.load(gain + g * size + c, mask=there, other=0.0)[None, :]
            else:
                of_matrix = ((r // each) * groups + g)[:, None] * size + c[None, :]
                apart = tl.load(spread + of_matrix, mask=inside[:, None] & there[None, :], other=0.0)
                share = tl.load(gain + of_matrix, mask=inside[:, None] & there[None, :], other=0.0)
            moved = apart * step[:, None]
            high = w + moved
            low = w - moved
            q = tl.minimum(tl.maximum(high / scale[:, None] + zero[:, None], 0.0), TOP)
            high -= scale[:, None] * ((q + 12582912.0) - 12582912.0 - zero[:, None])
            q = tl.minimum(tl.maximum(low / scale[:, None] + zero[:, None], 0.0), TOP)
            low -= scale[:, None] * ((q + 12582912.0) - 12582912.0 - zero[:, None])
            total += tl.sum((high * high + low * low) * share, 1)
        tl.store(parts + at, total / 2, mask=inside)


def clipping_errors(weight: Tensor, scales: Tensor, zeros: Tensor, spread: Tensor, gain: Tensor, bits: int) -> Tensor:
    """`reference.clipping_errors` on a GPU; all tensors float32 and contiguous.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    (rows, n), (alternatives, _, groups) = weight.shape, scales.shape
    of_matrices = spread.shape[:-1]
    _check(
        (
            ("weight", weight, (rows, n)),
            ("scales", scales, (alternatives, rows, groups)),
            ("zeros", zeros, (alternatives, rows, groups)),
            ("spread", spread, (*of_matrices, n)),
            ("gain", gain, (*of_matrices, n)),
        )
    )
    if not groups or n % groups:
        raise ValueError(f"{groups} groups do not divide {n} columns")
    if rows % of_matrices.numel():
        raise ValueError(f"{of_matrices.numel()} matrices do not divide {rows} rows")
    parts = torch.empty_like(scales)
    size = n // groups
    _clipping_errors_kernel[(triton.cdiv(rows, _SCORED_ROWS), groups)](
        weight, scales, zeros, spread, gain, parts, alternatives, rows, groups, size, rows // of_matrices.numel(),
        TOP=float(2**bits - 1), ROWS=_SCORED_ROWS, SHARED=not of_matrices,
        COLUMNS=min(_SCORED_COLUMNS, max(16, triton.next_power_of_2(size))),
    )  # fmt: skip
    return parts.sum(-1)


@triton.jit
def _nearest_errors_kernel(
    weight, scales, zeros, out, columns, groups, size, TOP: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = c < columns
    grid = row * groups + c // size
    w = tl.load(weight + row * columns + c, mask=there, other=0.0)
    scale = tl.load(scales + grid, mask=there, other=1.0)
    zero = tl.load(zeros + grid, mask=there, other=0.0)
    q = tl.minimum(tl.maximum(tl.div_rn(w, scale) + zero, 0.0), TOP)
    rounded = scale * ((q + 12582912.0) - 12582912.0 - zero)  # half to even, as in solve.py
    tl.store(out + row * columns + c, (w - rounded).to(out.dtype.element_ty), mask=there)


def nearest_errors(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`reference.nearest_errors` on a GPU; all tensors float32 and contiguous.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    (rows, n), groups = weight.shape, scales.shape[1]
    _check((("weight", weight, (rows, n)), ("scales", scales, (rows, groups)), ("zeros", zeros, (rows, groups))))
    if not groups or n % groups:
        raise ValueError(f"{groups} groups do not divide {n} columns")
    out = torch.empty(rows, n, dtype=dtype, device=weight.device)
    if out.numel():
        _nearest_errors_kernel[(rows, triton.cdiv(n, _ROUNDED_COLUMNS))](
            weight, scales, zeros, out, n, groups, n // groups, TOP=float(2**bits - 1), COLUMNS=_ROUNDED_COLUMNS
        )
    return out


def _check(tensors: Iterable[tuple[str, Tensor, tuple[int, ...]]]) -> None:
    for name, tensor, shape in tensors:
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
