"""x Wᵀ for one row and 4 bits, on CUDA cores, for small weights: those take less time than what surrounds their bytes.

A program computes four outputs from all channels, so that nothing is added up between programs. A thread holds 16 bytes
of words, whose codes go into the mantissa of 1.0 as they lie: 1 + q 2^-e is one operation a code, and 2^e is taken into
x, the ones and the zeros into one sum a chunk. All arithmetic is in float32.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# ruff: noqa: RUF005  (Triton has no unpacking)
from __future__ import annotations

import torch
from torch import Tensor

from ..needs_triton import tl, triton
from .codes import PTX, of_pair, scale_of
from .in_turn import fetch, launch, let_go, wait
from .layout import Arranged, Layout
from .workspace import Workspace

_OUTPUTS = tl.constexpr(4)  # of a program


def takes(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a weight and inputs of a dtype. Inputs are read two at a time."""
    step = layout.n_in % layout.step == 0
    return layout.bits == 4 and layout.group == 128 and step and dtype in (torch.float16, torch.bfloat16)


@triton.constexpr_function
def _distance(at):
    """The shift to the left that brings a code at bit `at` to bit 11, 15 or 19: three shifts for a word's eight."""
    return -9 if at >= 20 else 3 if at >= 8 else 15


@triton.constexpr_function
def _in_mantissa(mask):
    return f"lop3.b32 $0, $1, {mask}, 0x3f800000, 0xea;"


@triton.jit
def _code(word, AT: tl.constexpr):
    """1 + q 2^(AT + distance - 23) in float32, of the code at bit AT of int32 words."""
    MOVE: tl.constexpr = _distance(AT)
    moved = word << MOVE if MOVE >= 0 else word >> -MOVE
    if PTX:
        CODE: tl.constexpr = _in_mantissa(15 << (AT + MOVE))
        bits = tl.inline_asm_elementwise(CODE, "=r,r", [moved], dtype=tl.int32, is_pure=True, pack=1)
    else:
        bits = (moved & (15 << (AT + MOVE))) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _input(pair, SECOND: tl.constexpr, BF16: tl.constexpr):
    """The first or the second of two inputs in int32, in float32."""
    bits = of_pair(pair, SECOND).to(tl.int16)
    return bits.to(tl.bfloat16 if BF16 else tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scaled(x, AT: tl.constexpr):
    return x * (2 ** (23 - AT - _distance(AT)))


@triton.jit
def _announce(words, scales, zeros, turn, first, stride, blocks, SYMMETRIC: tl.constexpr, CHUNKS: tl.constexpr):
    """Has half a turn's words, with their scales and zeros, fetched into the L2 cache: 16 times 32 bytes a block."""
    sector = tl.arange(0, CHUNKS)
    row = tl.minimum(turn * (CHUNKS // 16) + sector // 16, blocks - 1) * stride + first
    fetch(words + row.to(tl.int64) * 32 + sector % 16 * 8)
    fetch(scales + row)
    if not SYMMETRIC:
        fetch(zeros + row)


@triton.jit
def _one_row_kernel(
    x, words, scales, zeros, bias, out, N, stride, blocks,
    BF16: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr, CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * _OUTPUTS
    chunk = tl.arange(0, CHUNKS)[:, None]
    u = chunk % 8 * 4 + tl.arange(0, 4)[None, :]
    if EARLY:
        for i in tl.static_range(EARLY - 2):
            _announce(words, scales, zeros, i, first, stride, blocks, SYMMETRIC, CHUNKS)
        wait()
        if EARLY > 1:
            let_go()
    acc = ()
    for _ in tl.static_range(_OUTPUTS):
        acc = acc + (tl.zeros((CHUNKS, 1), tl.float32),)
    for start in range(0, blocks, CHUNKS // 8):
        block = start + chunk // 8
        there = block < blocks
        w = ()
        s = ()
        for r in tl.static_range(_OUTPUTS):
            row = block * stride + first + r
            w = w + (tl.load(words + row.to(tl.int64) * 32 + u, mask=there, other=0, eviction_policy="evict_first"),)
            s = s + (tl.load(scales + row, mask=there, other=0),)
        new = acc
        for half in tl.static_range(2):  # a group: two planes
            a = tl.load(x + block * 128 + 64 * half + u, mask=there, other=0)
            b = tl.load(x + block * 128 + 64 * half + 32 + u, mask=there, other=0)
            a0, a1, b0, b1 = _input(a, 0, BF16), _input(a, 1, BF16), _input(b, 0, BF16), _input(b, 1, BF16)
            plain = tl.sum(a0 + a1 + b0 + b1, 1, keep_dims=True)
            a0, a1 = _scaled(a0, 8 * half), _scaled(a1, 8 * half + 16)
            b0, b1 = _scaled(b0, 8 * half + 4), _scaled(b1, 8 * half + 20)
            less = tl.sum(a0 + a1 + b0 + b1, 1, keep_dims=True)
            if SYMMETRIC:
                less += 8.0 * plain
            old = new
            new = ()
            for r in tl.static_range(_OUTPUTS):
                products = _code(w[r], 8 * half) * a0
                products += _code(w[r], 8 * half + 16) * a1
                products += _code(w[r], 8 * half + 4) * b0
                products += _code(w[r], 8 * half + 20) * b1
                total = tl.sum(products, 1, keep_dims=True) - less
                if not SYMMETRIC:
                    z = tl.load(zeros + block * stride + first + r, mask=there, other=0)
                    total -= of_pair(z, half).to(tl.float32) * plain
                new = new + (old[r] + scale_of(s[r], half) * total,)
        acc = new
    if EARLY == 1:
        let_go()
    y = tl.join(tl.join(acc[0], acc[2]), tl.join(acc[1], acc[3]))
    y = tl.sum(tl.reshape(y, (CHUNKS, _OUTPUTS)), 0)
    n = first + tl.arange(0, _OUTPUTS)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


def one_row(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, CHUNKS: int = 64, EARLY: int = 0,
) -> None:  # fmt: skip
    """Writes x Wᵀ + bias, accumulated in float32.

    Args:
        x: float16 or bfloat16 [1, in], contiguous, its address a multiple of 4, its channels in the weight's order.
        layout, arranged: The weight; see `takes`.
        bias: [out], any floating dtype, or None.
        out: [1, out] in x's dtype, contiguous.
        workspace: Not used.
        CHUNKS: Of 16 bytes of words, that a program takes at a time: as many as it has threads.
        EARLY: See `few_rows.few_rows`.
    """
    _one_row_kernel[(layout.outputs // _OUTPUTS.value,)](
        x.view(torch.int32), arranged.words.view(torch.int32), arranged.scales, arranged.zeros, bias, out,
        layout.n_out, arranged.stride, layout.steps,
        BF16=x.dtype == torch.bfloat16, SYMMETRIC=layout.symmetric, HAS_BIAS=bias is not None, CHUNKS=CHUNKS,
        EARLY=EARLY, num_warps=CHUNKS // 32, **launch(EARLY),
    )  # fmt: skip
