"""x Wᵀ for one row and symmetric weights of 2 bits, by the tensor cores' product of bytes, which is exact.

Like `few_rows`, but codes are not made floats: they are multiplied where they lie in bytes of words, with half of the
operations. A mask leaves the codes of two planes, one in the lower bytes of words and one in the upper, which count 4^p
for codes p places up; at the top they are signed, and less their zero if the highest bit is turned.

The row is eight columns. In units of 2^-29 of a power of two above the largest its numbers are integers of 32 bits,
whose bytes are signed digits. Each of the four has two columns, one with the digits of channels in lower bytes and one
of those in upper: they are of different groups, whose sums are scaled apart. A kernel before writes them in the words'
order, with the share of the zeros in the sums. A number below 2^-12 of the row's largest may lose bits; a row with an
infinite number or NaN is NaN.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from ..needs_triton import tl, triton
from .codes import PTX, scale_of
from .few_rows import store_sum
from .layout import Arranged, Layout
from .workspace import Workspace

_PRODUCTS = tl.constexpr(4)  # of a step: planes 0 and 4, 1 and 5, 2 and 6, 3 and 7
_LANES = tl.constexpr(64)
_ROW = tl.constexpr(128)  # bytes of an output's words
_FLOAT = tl.constexpr(0x4B400000)  # as a float 1.5 · 2^23: its sums with small integers are the floats of their sums
_OF_FLOAT = tl.constexpr(1.5 * 2**23)


def takes(layout: Layout, dtype: torch.dtype) -> bool:
    """True for symmetric weights of 2 bits with 128 channels a group, and x in float16 or bfloat16."""
    return layout.bits == 2 and layout.symmetric and layout.group == 128 and dtype != torch.float32


@triton.jit
def _power_of_2(exponent):
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _digits_kernel(x, digits, shares, unit, K, BLOCK: tl.constexpr):
    step, product = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, BLOCK)
    numbers = tl.load(x + channels, mask=channels < K, other=0).to(tl.float32)
    most = tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # the bits of the largest, or of NaN
    exponent = tl.maximum(most >> 23, 29) - 126  # the largest is below 2^exponent
    if (step == 0) & (product == 0):
        tl.store(unit, tl.where(most < 0x7F800000, _power_of_2(exponent - 29), float("nan")))
    byte = tl.arange(0, _ROW)[None, :]
    column = tl.arange(0, 8)[:, None]
    channel = (step * 8 + product + byte % 2 * 4) * _LANES + byte // 2
    number = tl.load(x + channel, mask=channel < K, other=0).to(tl.float32)
    number = number * _power_of_2(29 - exponent) * _power_of_2(-2 * product)
    number = tl.floor(number + 0.5).to(tl.int32)
    number = (number + 0x00808080) ^ 0x00808080  # bytes of -128 to 127
    digit = (number >> (column // 2 * 8)).to(tl.int8)
    digit = tl.where(byte % 2 == column % 2, digit, 0).to(tl.int8)
    at = (step * _PRODUCTS + product) * 8
    tl.store(digits + (at + column) * _ROW + byte, digit)
    tl.store(shares + at + tl.arange(0, 8), tl.sum(digit.to(tl.int32) << (1 + 2 * product), 1))


@triton.constexpr_function
def ptx(product):
    """PTX of a product's codes $0, at their places in four bytes, of words $1."""
    turned = "0x80808080" if product == 3 else "0"
    return f"lop3.b32 $0, $1, {turned}, 0x{0x03030303 << 2 * product:08x}, 0x28;"  # (a ^ b) & c


@triton.jit
def _codes(words, PRODUCT: tl.constexpr):
    """A product's codes at their places, int8, of words as bytes; at the top less their zero."""
    if PTX:
        CODE: tl.constexpr = ptx(PRODUCT)
        q = tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=tl.int8, is_pure=True, pack=4)
    else:
        q = words.to(tl.int32) & (3 << 2 * PRODUCT)
        q = (q - 128 if PRODUCT == 3 else q).to(tl.int8)
    return q


@triton.jit
def _by_bytes_kernel(
    digits, shares, unit, words, scales, bias, out, parts, counters, N, stride, steps,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pn, part = tl.program_id(0), tl.program_id(1)
    n = pn * BN + tl.arange(0, BN)
    byte = tl.arange(0, _ROW)[None, :]
    column = tl.arange(0, 8)
    acc = tl.zeros((BN, 8), tl.float32)
    for step in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT, num_stages=STAGES):
        tile = words + stride.to(tl.int64) * _ROW * step
        w = tl.load(tile + n[:, None] * _ROW + byte, eviction_policy="evict_first")
        first = tl.load(scales + 2 * step * stride + n)  # of planes 0 to 3
        second = tl.load(scales + (2 * step + 1) * stride + n)
        for half in tl.static_range(2):  # planes of one group in lower bytes, and one in upper
            start = tl.full((8,), _FLOAT, tl.int32)
            total = tl.zeros((BN, 8), tl.int32)
            for product in tl.static_range(2 * half, 2 * half + 2):
                at = (step * _PRODUCTS + product) * 8
                if product < 3:
                    start -= tl.load(shares + at + column)
                d = tl.load(digits + (at + column[:, None]) * _ROW + byte)
                total = tl.dot(_codes(w, product), tl.trans(d), total, out_dtype=tl.int32)
            value = (total + start[None, :]).to(tl.float32, bitcast=True) - _OF_FLOAT
            lower, upper = scale_of(first, half)[:, None], scale_of(second, half)[:, None]
            acc += value * tl.where((column % 2 == 0)[None, :], lower, upper)
    acc *= (_power_of_2(column // 2 * 8) * tl.load(unit))[None, :]
    y = tl.sum(acc, 1)[:, None]
    store_sum(y, bias, out, parts, counters, n, tl.arange(0, 1), 1, N, pn, part, HAS_BIAS, BN, 1, SPLIT)


def by_bytes(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, BN: int = 64, SPLIT: int = 1, STAGES: int = 3, warps: int = 2,
) -> None:  # fmt: skip
    """Writes x Wᵀ + bias, accumulated in float32.

    Args:
        x: [1, in], contiguous, its channels in the weight's order; see `takes`.
        layout, arranged: The weight.
        bias: [out], any floating dtype, or None.
        out: [1, out] in x's dtype, contiguous.
        workspace: Of the current stream.
        BN: Outputs of a tile.
        SPLIT: Programs that share a tile.
        STAGES: Depth of the pipeline of loads.
        warps: Of a program.
    """
    tiles, rows = layout.outputs // BN, layout.steps * _PRODUCTS.value * 8
    made = torch.empty(rows * (_ROW.value // 4 + 1) + 1, dtype=torch.int32, device=x.device)
    digits, shares, unit = made.split([rows * _ROW.value // 4, rows, 1])
    digits, unit = digits.view(torch.int8), unit.view(torch.float32)
    parts, counters = workspace.of(tiles, tiles * SPLIT * BN) if SPLIT > 1 else (out, out)
    _digits_kernel[(layout.steps, _PRODUCTS.value)](
        x, digits, shares, unit, layout.n_in, BLOCK=triton.next_power_of_2(layout.n_in), num_warps=8
    )
    _by_bytes_kernel[(tiles, SPLIT)](
        digits, shares, unit, arranged.words.view(torch.int8), arranged.scales, bias, out, parts, counters,
        layout.n_out, arranged.stride, layout.steps,
        HAS_BIAS=bias is not None, BN=BN, SPLIT=SPLIT, STAGES=STAGES, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
