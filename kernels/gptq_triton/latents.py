"""Weights whose scales, or codes too, are trained, and gradients for these, in Triton; `plain_latents` defines them."""

# mypy: disable-error-code="assignment, no-untyped-def"
from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .needs_triton import tl, triton

_TILE, _COLUMNS = 2048, 128  # weights of a program at a time, and the most channels of them


@triton.jit
def _rounded(latent, low, high):
    """Half to even, as torch.round: at 1.5·2^23 the spacing of float32 is 1. The ends are whole numbers."""
    held = tl.maximum(latent, low, propagate_nan=tl.PropagateNan.ALL)
    held = tl.minimum(held, high, propagate_nan=tl.PropagateNan.ALL)
    return (held + 12582912.0) - 12582912.0


@triton.jit
def _weight_kernel(
    codes, scales, low, high, out, rows, size,
    LATENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = r * tl.num_programs(1) + tl.program_id(1)
    scale = tl.load(scales + group, mask=r < rows, other=0.0)[:, None]
    if LATENT:
        least = tl.load(low + group, mask=r < rows, other=0.0)[:, None]
        most = tl.load(high + group, mask=r < rows, other=0.0)[:, None]
    for first in range(0, size, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        here = (r < rows)[:, None] & (c < size)[None, :]
        at = (group * size)[:, None] + c[None, :]
        value = tl.load(codes + at, mask=here, other=0).to(tl.float32)
        if LATENT:
            value = _rounded(value, least, most)
        tl.store(out + at, (value * scale).to(out.dtype.element_ty), mask=here)


@triton.jit
def _gradient_kernel(
    of_weight, codes, scales, low, high, of_scales, of_latents, rows, size,
    LATENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = r * tl.num_programs(1) + tl.program_id(1)
    if LATENT:
        scale = tl.load(scales + group, mask=r < rows, other=0.0)[:, None]
        least = tl.load(low + group, mask=r < rows, other=0.0)[:, None]
        most = tl.load(high + group, mask=r < rows, other=0.0)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, size, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        here = (r < rows)[:, None] & (c < size)[None, :]
        at = (group * size)[:, None] + c[None, :]
        value = tl.load(codes + at, mask=here, other=0).to(tl.float32)
        gradient = tl.load(of_weight + at, mask=here, other=0).to(tl.float32)
        if LATENT:
            of_latent = gradient * scale
            beyond = ((value > most) & (of_latent < 0)) | ((value < least) & (of_latent > 0))
            tl.store(of_latents + at, tl.where(beyond, 0.0, of_latent), mask=here)
            value = _rounded(value, least, most)
        total += tl.sum(gradient * value, 1)
    tl.store(of_scales + group, total, mask=r < rows)


def weight_of(
    codes: Tensor, scales: Tensor, ends: tuple[Tensor, Tensor] | None, groups: None, dtype: torch.dtype
) -> Tensor:
    """`plain_latents.weight_of` on a GPU in one pass, to the bit but for the sign of zero; tensors are contiguous.

    Groups are in order.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check(codes, scales, ends, groups)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.numel():
        low, high = (scales, scales) if ends is None else ends
        grid, size, tile = _tiles(codes, scales)
        with _on(codes):
            _weight_kernel[grid](codes, scales, low, high, out, len(codes), size, LATENT=ends is not None, **tile)
    return out


def gradients(
    of_weight: Tensor, codes: Tensor, scales: Tensor, ends: tuple[Tensor, Tensor] | None, groups: None
) -> tuple[Tensor, Tensor | None]:
    """`plain_latents.gradients` on a GPU in one pass; all tensors contiguous, groups in order.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    _check(codes, scales, ends, groups)
    if of_weight.shape != codes.shape or not of_weight.is_contiguous():
        raise ValueError(f"of_weight must be contiguous {list(codes.shape)}, got {list(of_weight.shape)}")
    of_scales = torch.empty_like(scales)
    of_latents = None if ends is None else torch.empty_like(codes)
    if codes.numel():
        low, high = (scales, scales) if ends is None else ends
        given = of_weight, codes, scales, low, high, of_scales, scales if of_latents is None else of_latents
        grid, size, tile = _tiles(codes, scales)
        with _on(codes):
            _gradient_kernel[grid](*given, len(codes), size, LATENT=ends is not None, **tile)
    return of_scales, of_latents


def _tiles(codes: Tensor, scales: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Programs, channels of a group, and the tile of a program."""
    size = codes.shape[1] // scales.shape[1]
    columns = min(_COLUMNS, triton.next_power_of_2(size))
    rows = _TILE // columns
    return (triton.cdiv(len(codes), rows), scales.shape[1]), size, {"ROWS": rows, "COLUMNS": columns}


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _check(codes: Tensor, scales: Tensor, ends: tuple[Tensor, Tensor] | None, groups: object) -> None:
    floats = [("scales", scales), *zip(("low", "high"), ends or (), strict=False)]
    for name, tensor in floats:
        fits = tensor.dim() == 2 and len(tensor) == len(codes) and codes.shape[1] % max(1, tensor.shape[1]) == 0
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or not fits or tensor.shape != scales.shape:
            raise ValueError(
                f"{name} must be contiguous float32, a column for each group of codes {list(codes.shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    wanted = (torch.float32,) if ends is not None else (torch.int8, torch.int16)
    if codes.dtype not in wanted or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous, of {' or '.join(map(str, wanted))}, got {codes.dtype}")
    if groups is not None:
        raise ValueError("groups must be in order and of one size")
