"""Codes less their zeros from words of the kernels' layout, exact in float16, bfloat16 or float32: `centered`.

A code that is put into the low bits of a float's mantissa, whose exponent is that of 1024 (float16) or 128 (bfloat16),
is the number 1024 + code·2^p for a code at bit p; one multiplication and addition gives code - zero for two weights.
Written as PTX, since the compiler makes two operations of the mask and the exponent, and knows no pairs.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from ..needs_triton import tl, triton
from .layout import pieces

# Triton's interpreter runs no PTX.
PTX = tl.constexpr(not triton.knobs.runtime.interpret)

_pieces = triton.constexpr_function(pieces)


@triton.constexpr_function
def word_of(plane, bits):
    """The word of a block that has a plane's codes, or the first of them."""
    return _pieces(bits, plane)[0][0]


@triton.constexpr_function
def half_of(plane, bits):
    """Of 3 bits the word of the plane's half, else 0."""
    return plane // 8 if bits == 3 else 0


@triton.constexpr_function
def place_of(plane, bits):
    """Where the plane's codes, or the first of their bits, lie in that word."""
    return _pieces(bits, plane)[0][1]


@triton.constexpr_function
def _place(plane, bits, bfloat16):
    """(shift, p): a word shifted right by `shift` has the plane's code at bit p of the mantissa. bfloat16 has seven
    bits there, and a shift by 8 serves both halves of a float16 word. Of 3 bits a half's own words are shifted by 7, or
    12, which brings the highest bit of its last plane to its place too."""
    if bits == 3 and plane % 8 == 7:
        return 0, 1 if bfloat16 else 6
    if bits == 3 and plane % 8 > 4:
        return plane // 8 * 8, 3 * (plane % 8 - 5)
    if bits == 3:
        at = 3 * (plane % 8)
        shift = at // 6 * 6 if bfloat16 else at // 9 * 7
        return shift, at - shift
    if bits == 8 or (bits == 4 and bfloat16):
        return bits * plane, 0
    if bits == 4:
        return 8 * (plane // 2), 4 * (plane % 2)
    if bfloat16:
        return 6 * (plane // 3), 2 * (plane % 3)
    return 8 * (plane // 4), 2 * (plane % 4)


@triton.constexpr_function
def _twice(number):
    return f"0x{number:04x}{number:04x}"


@triton.constexpr_function
def _shifted(source, distance):
    if distance == 0:
        return f"mov.b32 t, {source};"
    return f"shr.u32 t, {source}, {distance};" if distance > 0 else f"shl.b32 t, {source}, {-distance};"


@triton.constexpr_function
def start(plane, bits, bfloat16):
    """(base, shift): base + (zero << shift) are the bits of the float to add to the mantissa's: the code's place there,
    and the zero, negative. Of 8 bits in bfloat16, whose mantissa has seven, the upper half of the zero."""
    if bits == 8 and bfloat16:
        return 0xC508, 0  # -(2048 + 128)
    p = _place(plane, bits, bfloat16)[1]
    return (0xC300 - (p << 7) if bfloat16 else 0xE400 - (p << 10)), p


@triton.constexpr_function
def ptx(plane, bits, bfloat16, symmetric):
    """PTX of $0 = two codes less their zeros, of words $1 (the last plane of a half of 3 bits: $1 and $2), and, unless
    zeros are symmetric, then `start` (and for 8 bits in bfloat16 the zero's lower half, negative)."""
    shift, p = _place(plane, bits, bfloat16)
    kind, one, step = ("bf16x2", 0x4300, 7) if bfloat16 else ("f16x2", 0x6400, 10)
    unit = 0x3F80 if bfloat16 else 0x3C00
    parts = _pieces(bits, plane)
    operand = len(parts) + 1
    code = "{.reg .b32 t, v, f, c;"
    if symmetric:
        base, up = start(plane, bits, bfloat16)
        zero = 8 if bits == 8 and bfloat16 else 2 ** (bits - 1)
        code += f"mov.b32 c, {_twice(base + (zero << up))};"
    else:
        code += f"mov.b32 c, ${operand};"
    if len(parts) > 1:
        code += f"mov.b32 v, {_twice(one)};"
        for i in range(len(parts)):  # Triton 3.6 cannot read nested targets
            _, place, low, number = parts[i]
            code += _shifted(f"${i + 1}", place - low - p)
            code += f"lop3.b32 v, t, {_twice(((1 << number) - 1) << (low + p))}, v, 0xea;"
    else:
        code += _shifted("$1", shift)
    if bits == 8 and bfloat16:  # as 16·upper + lower: mantissas of seven bits
        code += f"lop3.b32 v, t, 0x000f000f, {_twice(one)}, 0xea; shr.u32 t, t, 4;"
        code += f"lop3.b32 t, t, 0x000f000f, {_twice(one)}, 0xea;"
        code += f"mov.b32 f, {_twice(unit + (4 << step))}; fma.rn.bf16x2 t, t, f, c;"
        code += f"mov.b32 f, {_twice(unit)};" + ("" if symmetric else f"fma.rn.bf16x2 v, v, f, ${operand + 1};")
        return code + "fma.rn.bf16x2 $0, v, f, t;}"
    if len(parts) == 1:
        code += f"lop3.b32 v, t, {_twice(((1 << bits) - 1) << p)}, {_twice(one)}, 0xea;"
    if p == 0 and not bfloat16:
        return code + "add.rn.f16x2 $0, v, c;}"
    return code + f"mov.b32 f, {_twice(unit - (p << step))}; fma.rn.{kind} $0, v, f, c;}}"


@triton.jit
def moved(words, distance):
    """int16 words shifted right by `distance`, int32 [1, 1]: 0, or 8 to have the upper bytes as the lower ones. Upper
    bytes of the result are undefined."""
    if PTX:
        CODE: tl.constexpr = "shr.u32 $0, $1, $2;"
        lower = tl.inline_asm_elementwise(CODE, "=r,r,r,r", [words, distance], dtype=tl.int16, is_pure=True, pack=2)
    else:
        lower = words >> distance
    return lower


@triton.jit
def centered(
    words, second, zero, kind,
    PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Codes of a plane less their zeros, exact, in the dtype of `kind`.

    Args:
        words: int16 [N, lanes] that have the plane's codes; of the last plane of a half of 3 bits the block's third.
        second: The half's own words, read for that plane only.
        zero: int32 [N, 1].
        kind: Anything of the dtype asked for.
        PLANE: The plane.
        BITS: Width of a code.
        BF16: The dtype is bfloat16.
        SYMMETRIC: Every zero is 2^(BITS - 1). It is then a constant of the code: an operand would make the compiler
            lay the words out anew.
    """
    LAST: tl.constexpr = BITS == 3 and PLANE % 8 == 7
    if PTX and kind.dtype != tl.float32:
        CODE: tl.constexpr = ptx(PLANE, BITS, BF16, SYMMETRIC)
        if SYMMETRIC:
            if LAST:
                q = tl.inline_asm_elementwise(CODE, "=r,r,r", [words, second], dtype=kind.dtype, is_pure=True, pack=2)
            else:
                q = tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=kind.dtype, is_pure=True, pack=2)
        else:
            START: tl.constexpr = start(PLANE, BITS, BF16)
            of_zero = zero >> 4 if BITS == 8 and BF16 else zero
            first = (START[0] + (of_zero << START[1])).to(tl.int16).to(kind.dtype, bitcast=True)
            if LAST:
                q = tl.inline_asm_elementwise(
                    CODE, "=r,r,r,r", [words, second, first], dtype=kind.dtype, is_pure=True, pack=2
                )
            elif BITS == 8 and BF16:
                lower = -(zero & 15).to(tl.float32).to(kind.dtype)
                q = tl.inline_asm_elementwise(
                    CODE, "=r,r,r,r", [words, first, lower], dtype=kind.dtype, is_pure=True, pack=2
                )
            else:
                q = tl.inline_asm_elementwise(CODE, "=r,r,r", [words, first], dtype=kind.dtype, is_pure=True, pack=2)
    else:
        if LAST:
            code = (words.to(tl.int32) >> (PLANE // 8 * 8 + 6)) & 3
            code |= (second.to(tl.int32) >> 13) & 4
        else:
            AT: tl.constexpr = place_of(PLANE, BITS)
            code = (words.to(tl.int32) >> AT) & ((1 << BITS) - 1)
        q = (code - zero).to(kind.dtype)
    return q


@triton.jit
def of_pair(pairs, SECOND: tl.constexpr):
    """The earlier or the later group's 16 bits of int32 pairs, as int32 in [0, 65536)."""
    return (pairs >> 16) & 0xFFFF if SECOND else pairs & 0xFFFF


@triton.jit
def scale_of(pairs, SECOND: tl.constexpr):
    """A scale of pairs in float32."""
    return of_pair(pairs, SECOND).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
