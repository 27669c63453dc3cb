"""Values of codes that are not packed, of several matrices in one launch: `values_of`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .needs_triton import tl, triton

_TILE = 64  # rows and inputs of a program


@triton.jit
def _values_kernel(codes, zeros, scales, g_idx, out, n_in, rows, groups, TILE: tl.constexpr):
    matrix = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    r = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = (i < n_in)[:, None] & (r < rows)[None, :]
    group = tl.load(g_idx + matrix * n_in + i, mask=i < n_in, other=0)
    of_group = (matrix * groups + group)[:, None] * rows + r[None, :]
    code = tl.load(codes + (matrix * n_in + i)[:, None] * rows + r[None, :], mask=here, other=0).to(tl.int32)
    zero = tl.load(zeros + of_group, mask=here, other=0).to(tl.int32)
    scale = tl.load(scales + of_group, mask=here, other=0).to(tl.float32)
    value = (code - zero).to(tl.float32) * scale
    at = (matrix * rows + r)[:, None] * n_in + i[None, :]
    tl.store(out + at, tl.trans(value).to(out.dtype.element_ty), mask=(r < rows)[:, None] & (i < n_in)[None, :])


def values_of(codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, out: Tensor) -> None:
    """Writes B matrices, each value computed in float32 and rounded once.

    Args:
        codes: uint8 [B, in, rows].
        zeros: uint8 [B, G, rows].
        scales: float16 [B, G, rows].
        g_idx: int32 [B, in].
        out: float16, bfloat16 or float32 [B, rows, in], contiguous; written to.

    Raises:
        ValueError: It has another shape or is not contiguous.
    """
    batch, n_in, rows = codes.shape
    if out.shape != (batch, rows, n_in) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {[batch, rows, n_in]}, got {list(out.shape)}")
    parts = [part.contiguous() for part in (codes, zeros, scales, g_idx)]
    with torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext():
        grid = (triton.cdiv(n_in, _TILE), triton.cdiv(rows, _TILE), batch)
        _values_kernel[grid](*parts, out, n_in, rows, zeros.shape[1], TILE=_TILE)
