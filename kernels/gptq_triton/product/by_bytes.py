"""x Wᵀ for one to four rows of symmetric weights, by the tensor cores' product of bytes, which is exact.

Like `few_rows`, but codes are not made floats: they are multiplied where they lie in bytes of words, with a quarter to
a half of the operations. A row of x is four columns: in units of 2^-29 of a power of two above the largest its numbers
are integers of 32 bits, whose bytes are signed digits. A kernel before writes them in the order of the words' bytes,
two columns each, one for each slot of `code_bytes`, with the share of the zeros in the sums. A number below 2^-12 of
its row's largest may lose bits; a row with an infinite number or NaN is NaN.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005  (Triton has no unpacking)
from __future__ import annotations

import torch
from torch import Tensor

from ..needs_triton import tl, triton
from .code_bytes import GROUPS, PRODUCTS, signed
from .code_bytes import ptx as ptx_of
from .codes import PTX, scale_of
from .few_rows import store_sum
from .in_turn import announce, launch, let_go, wait
from .layout import Arranged, Layout, pieces
from .workspace import Workspace

ROWS = 4  # at most: more take longer than `few_rows`

_pieces = triton.constexpr_function(pieces)
_signed = triton.constexpr_function(signed)
_ptx = triton.constexpr_function(ptx_of)
_FLOAT = tl.constexpr(0x4B400000)  # as a float 1.5 · 2^23: the bits of its sum with an integer are theirs
_OF_FLOAT = tl.constexpr(1.5 * 2**23)


def takes(layout: Layout, dtype: torch.dtype) -> bool:
    """True for symmetric weights of less than 8 bits with 128 channels a group, and x in float16 or bfloat16."""
    return layout.symmetric and layout.bits < 8 and layout.group == 128 and dtype != torch.float32


@triton.constexpr_function
def _products(bits):
    return len(PRODUCTS[bits])


@triton.constexpr_function
def _product(bits, product, item, byte):
    """A product's plane, place or slot (item 0, 1, 2) in the lower or the upper byte."""
    return PRODUCTS[bits][product][item][byte]


@triton.constexpr_function
def _packed(bits, item, byte):
    """Those of all products, four bits each."""
    values = [(product.planes, product.places, product.slots)[item][byte] for product in PRODUCTS[bits]]
    return sum(value << 4 * i for i, value in enumerate(values))


@triton.constexpr_function
def _chain(bits, product):
    return PRODUCTS[bits][product].chain


@triton.constexpr_function
def _chains(bits):
    return len(GROUPS[bits])


@triton.constexpr_function
def _group(bits, chain, slot):
    return GROUPS[bits][chain][slot]


@triton.jit
def _power_of_2(exponent):
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _of_product(ITEM: tl.constexpr, product, upper, BITS: tl.constexpr):
    """A plane, place or slot of a product, of the upper bytes where `upper`."""
    low = (tl.full([], _packed(BITS, ITEM, 0), tl.int64) >> (4 * product)) & 15
    high = (tl.full([], _packed(BITS, ITEM, 1), tl.int64) >> (4 * product)) & 15
    return tl.where(upper, high.to(tl.int32), low.to(tl.int32))


@triton.jit
def _digits_kernel(
    x, digits, shares, units, M, K,
    BITS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, PRODUCTS: tl.constexpr, BM: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    step, product, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if EARLY:
        wait()
        let_go()
    row = x + tl.minimum(m, M - 1).to(tl.int64) * K
    all_of = tl.arange(0, BLOCK)
    numbers = tl.load(row + all_of, mask=all_of < K, other=0).to(tl.float32)
    most = tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # the bits of the largest, or of NaN
    exponent = tl.maximum(most >> 23, 29) - 126  # the largest is below 2^exponent
    if (step == 0) & (product == 0):
        unit = _power_of_2(exponent - 29)
        tl.store(units + m, tl.where(most < 0x7F800000, unit, float("nan")))
    byte = tl.arange(0, 2 * LANES)[None, :]  # of an output's words
    upper = byte % 2 == 1
    column = tl.arange(0, 8)[:, None]  # two for each digit
    place = _of_product(1, product, upper, BITS)
    channel = step * (PLANES * LANES) + _of_product(0, product, upper, BITS) * LANES + byte // 2
    number = tl.load(row + channel, mask=channel < K, other=0).to(tl.float32)
    number = tl.floor(number * _power_of_2(29 - exponent) * _power_of_2(-place) + 0.5).to(tl.int32)
    number = (number + 0x00808080) ^ 0x00808080  # bytes of -128 to 127
    digit = (number >> (column // 2 * 8)).to(tl.int8)
    digit = tl.where(_of_product(2, product, upper, BITS) == column % 2, digit, 0).to(tl.int8)
    at = (step * PRODUCTS + product) * BM + m
    tl.store(digits + at * (16 * LANES) + column * (2 * LANES) + byte, digit)
    share = (digit.to(tl.int32) << (BITS - 1)) << place
    tl.store(shares + at * 8 + tl.arange(0, 8), tl.sum(share, 1))


@triton.jit
def _code(low, high, BITS: tl.constexpr, PLANE: tl.constexpr):
    """A plane's codes of a block's words, given as their lower and upper bytes, int32 [tiles, BN, LANES]."""
    code = tl.zeros_like(low[0])
    for i in tl.static_range(len(_pieces(BITS, PLANE))):
        PIECE: tl.constexpr = _pieces(BITS, PLANE)[i]
        word = (low[PIECE[0]] & 255) | ((high[PIECE[0]] & 255) << 8)
        code |= ((word >> PIECE[1]) & ((1 << PIECE[3]) - 1)) << PIECE[2]
    return code


@triton.jit
def _code_bytes(w, PRODUCT: tl.constexpr, BITS: tl.constexpr):
    """A product's codes at their places, int8 [BN, 2 LANES], of a block's words as bytes."""
    if PTX:
        CODE: tl.constexpr = _ptx(BITS, PRODUCT)
        if BITS == 3:
            q = tl.inline_asm_elementwise(CODE, "=r,r,r,r", [w[0], w[1], w[2]], dtype=tl.int8, is_pure=True, pack=4)
        else:
            q = tl.inline_asm_elementwise(CODE, "=r,r", [w[0]], dtype=tl.int8, is_pure=True, pack=4)
    else:
        low = ()
        high = ()
        for i in tl.static_range(len(w)):
            lower, upper = tl.split(tl.reshape(w[i].to(tl.int32), (w[i].shape[0], w[i].shape[1] // 2, 2)))
            low = low + (lower,)
            high = high + (upper,)
        lower = _code(low, high, BITS, _product(BITS, PRODUCT, 0, 0)) << _product(BITS, PRODUCT, 1, 0)
        upper = _code(low, high, BITS, _product(BITS, PRODUCT, 0, 1)) << _product(BITS, PRODUCT, 1, 1)
        q = tl.reshape(tl.join(lower, upper), w[0].shape)
        if _signed(BITS, PRODUCT):
            q -= 128
        q = q.to(tl.int8)
    return q


@triton.jit(do_not_specialize=["M"])
def _by_bytes_kernel(
    digits, shares, units, words, scales, bias, out, parts, counters, M, N, stride, steps,
    BITS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, PRODUCTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    pn, part = tl.program_id(0), tl.program_id(1)
    COLUMNS: tl.constexpr = 8 * BM
    ROW: tl.constexpr = 2 * LANES  # bytes of an output's words
    PAIRS: tl.constexpr = PLANES * LANES // 256
    TILES: tl.constexpr = 3 if BITS == 3 else 1
    n = pn * BN + tl.arange(0, BN)
    byte = tl.arange(0, ROW)[None, :]
    column = tl.arange(0, COLUMNS)
    first_slot = (column % 2 == 0)[None, :]
    if EARLY:
        whole = words.to(tl.pointer_type(tl.int16), bitcast=True)
        for i in tl.static_range(AHEAD):
            ahead = part * steps // SPLIT + i
            if ahead < (part + 1) * steps // SPLIT:
                announce(whole, scales, scales, ahead, pn * BN, stride, BITS, LANES, PLANES, 1, 128, True, BN)
        wait()
    acc = tl.zeros((BN, COLUMNS), tl.float32)
    for step in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT, num_stages=STAGES):
        w = ()
        for i in tl.static_range(TILES):
            tile = words + stride.to(tl.int64) * ROW * (step * TILES + i)
            w = w + (tl.load(tile + n[:, None] * ROW + byte, eviction_policy="evict_first"),)
        s = ()
        for i in tl.static_range(PAIRS):
            s = s + (tl.load(scales + (step * PAIRS + i) * stride + n),)
        for chain in tl.static_range(_chains(BITS)):
            start = tl.full((COLUMNS,), _FLOAT, tl.int32)
            total = tl.zeros((BN, COLUMNS), tl.int32)
            for product in tl.static_range(PRODUCTS):
                if _chain(BITS, product) == chain:
                    at = step * PRODUCTS + product
                    if not _signed(BITS, product):
                        start -= tl.load(shares + at * COLUMNS + column)
                    d = tl.load(digits + at * (COLUMNS * ROW) + column[:, None] * ROW + byte)
                    total = tl.dot(_code_bytes(w, product, BITS), tl.trans(d), total, out_dtype=tl.int32)
            value = (total + start[None, :]).to(tl.float32, bitcast=True) - _OF_FLOAT
            s0 = scale_of(s[_group(BITS, chain, 0) // 2], _group(BITS, chain, 0) % 2)
            s1 = scale_of(s[_group(BITS, chain, 1) // 2], _group(BITS, chain, 1) % 2)
            acc += value * tl.where(first_slot, s0[:, None], s1[:, None])
    if EARLY:
        let_go()
    acc *= (_power_of_2(column % 8 // 2 * 8) * tl.load(units + column // 8))[None, :]
    y = tl.sum(tl.reshape(acc, (BN, BM, 8)), 2)
    store_sum(y, bias, out, parts, counters, n, tl.arange(0, BM), M, N, pn, part, HAS_BIAS, BN, BM, SPLIT)


def by_bytes(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, BN: int = 64, BM: int = 1, SPLIT: int = 1, STAGES: int = 3, warps: int = 2, EARLY: int = 0,
    AHEAD: int = 0,
) -> None:  # fmt: skip
    """Writes x Wᵀ + bias, accumulated in float32.

    Args:
        x: [M, in], contiguous, M at most BM, its channels in the weight's order; see `takes`.
        layout, arranged: The weight.
        bias: [out], any floating dtype, or None.
        out: [M, out] in x's dtype, contiguous.
        workspace: Of the current stream.
        BN, BM: Outputs and rows of a tile; BM is a power of two.
        SPLIT: Programs that share a tile.
        STAGES: Depth of the pipeline of loads.
        warps: Of a program.
        EARLY: 1 to begin while a product before ends, and let one after it do so; see `in_turn`.
        AHEAD: Steps whose words are fetched into the L2 cache while x's digits are written, with EARLY.
    """
    products, tiles = len(PRODUCTS[layout.bits]), layout.outputs // BN
    shape = {"BITS": layout.bits, "LANES": layout.lanes, "PLANES": layout.planes, "PRODUCTS": products, "BM": BM}
    columns = layout.steps * products * BM * 8  # of all products
    made = torch.empty(columns * (layout.lanes // 2 + 1) + BM, dtype=torch.int32, device=x.device)
    digits, shares, units = made.split([columns * layout.lanes // 2, columns, BM])
    parts, counters = workspace.of(tiles, tiles * SPLIT * BN * BM) if SPLIT > 1 else (out, out)
    digits, units = digits.view(torch.int8), units.view(torch.float32)
    _digits_kernel[(layout.steps, products, BM)](
        x, digits, shares, units, len(x), layout.n_in, **shape, BLOCK=triton.next_power_of_2(layout.n_in), EARLY=EARLY,
        num_warps=8, **launch(EARLY),
    )  # fmt: skip
    _by_bytes_kernel[(tiles, SPLIT)](
        digits, shares, units, arranged.words.view(torch.int8), arranged.scales, bias, out, parts, counters,
        len(x), layout.n_out, arranged.stride, layout.steps, **shape,
        HAS_BIAS=bias is not None, BN=BN, SPLIT=SPLIT, STAGES=STAGES, EARLY=EARLY, AHEAD=AHEAD,
        num_warps=warps, num_stages=STAGES, **launch(EARLY),
    )  # fmt: skip
