"""Words in shared memory made weights in registers, for `many_rows`, in Gluon: `words_of`, `weights`.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RUF005  (Triton has no unpacking)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..needs_triton import triton
from .codes import ptx, start
from .layout import pieces

_pieces = triton.constexpr_function(pieces)


@triton.constexpr_function
def _ptx_scaled(plane, bits, bfloat16, symmetric):
    """PTX of $0 = two weights, of the operands of `codes.ptx` and the scales (in bfloat16 the upper part, then the
    rest), rounded once: a code times the rest of a scale, of three bits, is exact."""
    code = ptx(plane, bits, bfloat16, symmetric).replace("$0", "v")[:-1]
    scale = len(_pieces(bits, plane)) + (1 if symmetric else 2)
    if not bfloat16:
        return code + f"mul.rn.f16x2 $0, v, ${scale};}}"
    return code + f"mov.b32 f, 0x80008000; fma.rn.bf16x2 t, v, ${scale + 1}, f; fma.rn.bf16x2 $0, v, ${scale}, t;}}"


@triton.constexpr_function
def _constraints(operands):
    return "=r" + ",r" * operands


@gluon.jit
def weights(
    lower, upper, scales, zeros, kind,
    PART: gl.constexpr, BITS: gl.constexpr, BF16: gl.constexpr, SYMMETRIC: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """A part's weights in the dtype of `kind`, of a turn's words [n, 32] and its pairs [n] of scales and zeros; its
    codes less their zeros if LATE."""
    GROUP: gl.constexpr = PART // parts_of(BITS)
    PLANE: gl.constexpr = PART // 2 if BITS == 4 else PART
    CODE: gl.constexpr = ptx(PLANE, BITS, BF16, SYMMETRIC) if LATE else _ptx_scaled(PLANE, BITS, BF16, SYMMETRIC)
    if BITS == 3:
        operands = (lower,) if PLANE < 5 else (upper,) if PLANE < 7 else (upper, lower)
    else:
        operands = (upper,) if BITS == 4 and PART % 2 else (lower,)
    if not SYMMETRIC:
        START: gl.constexpr = start(PLANE, BITS, BF16)
        bits = (START[0] + (of_pair(zeros[GROUP // 2], GROUP % 2) << START[1])).to(gl.int16)
        operands = operands + (gl.expand_dims(bits.to(kind.dtype, bitcast=True), 1),)
    if not LATE:
        scale = of_pair(scales[GROUP // 2], GROUP % 2).to(gl.int16).to(gl.float16, bitcast=True)
        if BF16:
            wide = scale.to(gl.float32)
            leading = wide.to(gl.bfloat16)
            rest = (wide - leading.to(gl.float32)).to(gl.bfloat16)
            operands = operands + (gl.expand_dims(leading, 1), gl.expand_dims(rest, 1))
        else:
            operands = operands + (gl.expand_dims(scale, 1),)
    return gl.inline_asm_elementwise(
        CODE, _constraints(len(operands)), operands, dtype=kind.dtype, is_pure=True, pack=2
    )


@triton.constexpr_function
def tiles_of(bits):
    """Tiles of words of a turn that a group of warps has."""
    return 1 if bits == 2 else 2


@triton.constexpr_function
def wide_of(bits):
    """Channels of x that lie side by side in a buffer: of 2 bits a turn has half of each plane's."""
    return 32 if bits == 2 else 64


@triton.constexpr_function
def parts_of(bits):
    """Parts of 32 channels in a turn that share a scale."""
    return 2 if bits == 2 else 4


@gluon.jit
def of_pair(pairs, SECOND: gl.constexpr):
    """`codes.of_pair`."""
    return (pairs >> 16) & 0xFFFF if SECOND else pairs & 0xFFFF


@gluon.jit
def _moved(words, distance):
    """`codes.moved`."""
    CODE: gl.constexpr = "shr.u32 $0, $1, $2;"
    return gl.inline_asm_elementwise(CODE, "=r,r,r,r", [words, distance], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def words_of(
    ring, turn, at,
    INDEX: gl.constexpr, GROUPS: gl.constexpr, BITS: gl.constexpr, AHEAD: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """A turn's tiles of words in registers, of 3 bits with the half's codes where those of the first half lie; of 2
    bits the one there is, twice."""
    first = tiles_of(BITS) * (turn % AHEAD * GROUPS + INDEX)
    lower = ring.index(first).load(A)
    upper = lower
    if BITS > 2:
        upper = ring.index(first + 1).load(A)
    if BITS == 3:
        upper = _moved(upper, at % 2 * 8)
    return lower, upper
