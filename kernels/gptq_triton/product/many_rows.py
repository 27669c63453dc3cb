"""x Wᵀ for many rows on Hopper, in Gluon: 4, 3 and 2 bits, groups of 128 channels here.

A program for every multiprocessor goes through the tiles of the result. One of its warps has the copy engine fetch
words and x into two rings of buffers in shared memory; two or four groups of four warps expand words into weights in
registers, rounded once to x's dtype, while the tensor cores multiply those before. In plain Triton the compiler waits
for every product of weights that lie in registers, which costs a third. What bounds 256 rows is the L2 cache, from
which every tile's program reads all of x.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..needs_triton import triton
from .expand import of_pair, parts_of, tiles_of, weights, wide_of, words_of
from .in_turn import launch, let_go, wait
from .layout import Arranged, Layout
from .tiles import own, place, store_sum
from .workspace import Workspace

_SCALED_LATE = {2: 16, 3: 32, 4: 32}  # rows up to which it takes less to scale sums than weights, by width
_LANES = 32  # whose weights are multiplied at a time, a part: more spill


@gluon.jit
def _fetch(
    x, words, rings, sizes,
    BITS: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    JOINED: gl.constexpr, AHEAD: gl.constexpr, WIDTH: gl.constexpr, SHARED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    x_ring, ring, words_full, words_free, x_full, x_free = rings
    M, _, outputs, stride, turns = sizes
    TILES: gl.constexpr = tiles_of(BITS)
    WIDE: gl.constexpr = wide_of(BITS)
    turn = 0
    tiles = gl.cdiv(M, BM) * gl.cdiv(outputs, GROUPS * BN)
    start, stop, distance, first, end = own(tiles, turns, SHARED)
    for tile in range(start, stop, distance):
        n, m = place(tile, M, outputs, GROUPS * BN, BM, WIDTH)
        for at in range(gl.maximum(first - tile * turns, 0), gl.minimum(end - tile * turns, turns)):
            stage = turn % AHEAD
            mbarrier.wait(words_free.index(stage), turn // AHEAD & 1 ^ 1)
            full = words_full.index(stage)
            mbarrier.expect(full, GROUPS * TILES * BN * 32 * 2 + (256 * BM * 2 if JOINED == 4 else 0))
            for i in gl.static_range(GROUPS * TILES):
                if BITS == 3:  # of the half, and of both halves
                    tile_of_words = at // 2 * 3 + (2 if i % 2 else at % 2)
                else:  # lower and upper lanes, of 2 bits in turn
                    tile_of_words = at if BITS == 4 else at // 2
                lanes = i % TILES * 32 if BITS == 4 else at % 2 * 32 if BITS == 2 else 0
                corner = [tile_of_words * stride + n + i // TILES * BN, lanes]
                tma.async_copy_global_to_shared(words, corner, full, ring.index(GROUPS * TILES * stage + i))
            for piece in gl.static_range(256 // WIDE):
                of_x = turn * (4 // JOINED) + piece * WIDE // 64 // JOINED
                if JOINED < 4:
                    full = x_full.index(of_x % STAGES)
                    if piece * WIDE % 64 == 0:
                        mbarrier.wait(x_free.index(of_x % STAGES), of_x // STAGES & 1 ^ 1)
                        mbarrier.expect(full, 64 * BM * 2)
                channel = at // 2 * 512 + at % 2 * 32 + 64 * piece if BITS == 2 else at * 256 + 64 * piece
                buffer = x_ring.index(of_x % STAGES * (JOINED * 64 // WIDE) + piece % (JOINED * 64 // WIDE))
                tma.async_copy_global_to_shared(x, [m, channel], full, buffer)
            turn += 1
    if EARLY:
        let_go()


@gluon.jit
def _pairs(values, at, stride, columns, BITS: gl.constexpr):
    """A turn's pairs of scales or zeros, of 2 bits two of them: it has channels of all four groups of a step."""
    if BITS == 2:
        first = values + at // 2 * 2 * stride + columns
        return gl.load(first), gl.load(first + stride)
    else:
        return (gl.load(values + at * stride + columns),)


@gluon.jit
def _scaled(acc, total, pairs, GROUP: gl.constexpr):
    scale = of_pair(pairs[GROUP // 2], GROUP % 2).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return acc + total * gl.expand_dims(scale, 1)


@gluon.jit
def _turn(
    acc, total, lower, upper, a, before, s, z, next_s, next_z, kind, rings, turn, at, high, INDEX: gl.constexpr,
    GROUPS: gl.constexpr, BITS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    JOINED: gl.constexpr, AHEAD: gl.constexpr, BF16: gl.constexpr, SYMMETRIC: gl.constexpr, LATE: gl.constexpr,
    A: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """A turn's products of 256 channels in eight parts: the sums, and what the next turn begins with."""
    x_ring, ring, words_full, words_free, x_full, x_free = rings
    WIDE: gl.constexpr = wide_of(BITS)
    EACH: gl.constexpr = parts_of(BITS)
    next_lower = lower
    next_upper = upper
    for part in gl.static_range(8):
        of_x = turn * (4 // JOINED) + part // 2 // JOINED
        buffer = x_ring.index(of_x % STAGES * (JOINED * 64 // WIDE) + part * 32 // WIDE % (JOINED * 64 // WIDE))
        x = buffer.slice(part * 32 % WIDE, 32, dim=1).permute((1, 0))
        if LATE and part % EACH == 0:
            token = warpgroup_mma(a, x, gl.zeros([BN, BM], gl.float32, L), use_acc=False, is_async=True)
        else:
            token = warpgroup_mma(a, x, total if LATE else acc, is_async=True)
        multiplied = a
        of_part = s
        # The next weights are expanded while the tensor cores multiply these and those before. None are on
        # their way when the loop turns: the compiler would then wait for each.
        if part < 7:
            a = weights(lower, upper, s, z, kind, part + 1, BITS, BF16, SYMMETRIC, LATE)
        else:
            s = next_s
            z = next_z
            a = weights(next_lower, next_lower, s, z, kind, 0, BITS, BF16, SYMMETRIC, LATE)
        if part == 4:
            following = turn + 1
            mbarrier.wait(words_full.index(following % AHEAD), following // AHEAD & 1, pred=at + 1 < high)
            next_lower, next_upper = words_of(ring, following, at + 1, INDEX, GROUPS, BITS, AHEAD, A)
        if JOINED == 1 and part % 2 == 1:
            more = (part < 7) | (at + 1 < high)
            mbarrier.wait(x_full.index((of_x + 1) % STAGES), (of_x + 1) // STAGES & 1, pred=more)
        if part == 0:
            done = token
        elif part < 7 and part % EACH == 0 and LATE:
            done, total, before, a = warpgroup_mma_wait(1, deps=[token, total, before, a])
            acc = _scaled(acc, total, of_part, part // EACH - 1)
        elif part < 7:
            done, before, a = warpgroup_mma_wait(1, deps=[token, before, a])
        else:
            done, multiplied, a = warpgroup_mma_wait(0, deps=[token, multiplied, a])
            if JOINED == 1:
                mbarrier.arrive(x_free.index(of_x % STAGES), count=1)
            # Not once they are loaded, but once all have been used: a barrier does not wait for words that are
            # on their way to registers, and the copy engine may be there before they are read.
            mbarrier.arrive(words_free.index(turn % AHEAD), count=1)
            if LATE:
                acc = _scaled(acc, done, of_part, 7 // EACH)
        if JOINED == 1 and part > 0 and part % 2 == 0:
            mbarrier.arrive(x_free.index((of_x + STAGES - 1) % STAGES), count=1)
        if LATE:
            total = done
        else:
            acc = done
        before = multiplied
    return acc, total, next_lower, next_upper, a, before, s, z


@gluon.jit
def _multiply(
    scales, zeros, bias, out, parts, counters, rings, sizes, INDEX: gl.constexpr,
    GROUPS: gl.constexpr, BITS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    JOINED: gl.constexpr, AHEAD: gl.constexpr, WIDTH: gl.constexpr, SHARED: gl.constexpr, SYMMETRIC: gl.constexpr,
    HAS_BIAS: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    _, ring, words_full, _, x_full, _ = rings
    M, N, outputs, stride, turns = sizes
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, A)
    BF16: gl.constexpr = out.dtype.element_ty == gl.bfloat16
    kind = gl.zeros([BN], out.dtype.element_ty, R)
    turn = 0
    tiles = gl.cdiv(M, BM) * gl.cdiv(outputs, GROUPS * BN)
    start, stop, distance, first, end = own(tiles, turns, SHARED)
    for tile in range(start, stop, distance):
        n0, m0 = place(tile, M, outputs, GROUPS * BN, BM, WIDTH)
        low, high = gl.maximum(first - tile * turns, 0), gl.minimum(end - tile * turns, turns)
        n = gl.minimum(n0 + INDEX * BN + gl.arange(0, BN, R), outputs - 1)
        of_s = gl.minimum(n0 + INDEX * BN + gl.arange(0, BN, gl.SliceLayout(1, L)), outputs - 1) if LATE else n
        acc = gl.zeros([BN, BM], gl.float32, L)
        total = acc
        s = _pairs(scales, low, stride, of_s, BITS)
        z = s if SYMMETRIC else _pairs(zeros, low, stride, n, BITS)
        mbarrier.wait(words_full.index(turn % AHEAD), turn // AHEAD & 1)
        lower, upper = words_of(ring, turn, low, INDEX, GROUPS, BITS, AHEAD, A)
        a = weights(lower, lower, s, z, kind, 0, BITS, BF16, SYMMETRIC, LATE)
        before = a
        if JOINED == 1:
            mbarrier.wait(x_full.index(turn * 4 % STAGES), turn * 4 // STAGES & 1)
        for at in range(low, high):
            following = gl.minimum(at + 1, high - 1)
            next_s = _pairs(scales, following, stride, of_s, BITS)
            next_z = next_s if SYMMETRIC else _pairs(zeros, following, stride, n, BITS)
            acc, total, lower, upper, a, before, s, z = _turn(
                acc, total, lower, upper, a, before, s, z, next_s, next_z, kind, rings, turn, at, high, INDEX,
                GROUPS, BITS, BN, BM, STAGES, JOINED, AHEAD, BF16, SYMMETRIC, LATE, A, L,
            )  # fmt: skip
            turn += 1
        store_sum(
            acc, bias, out, parts, counters, tile, tiles, turns, n0 + INDEX * BN, m0, M, N,
            INDEX, GROUPS, HAS_BIAS, BN, BM, SHARED, L,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def _many_rows_kernel(
    x, words, scales, zeros, bias, out, parts, counters, M, N, outputs, stride, turns,
    BITS: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    JOINED: gl.constexpr, AHEAD: gl.constexpr, WIDTH: gl.constexpr, SHARED: gl.constexpr, SYMMETRIC: gl.constexpr,
    HAS_BIAS: gl.constexpr, LATE: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    ring = gl.allocate_shared_memory(gl.int16, [tiles_of(BITS) * GROUPS * AHEAD, BN, 32], words.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * JOINED * 64 // wide_of(BITS), BM, wide_of(BITS)], x.layout)
    words_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    words_free = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    x_full = words_full
    x_free = words_free
    if JOINED == 1:
        x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        x_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(AHEAD):
        mbarrier.init(words_full.index(i), count=1)
        mbarrier.init(words_free.index(i), count=GROUPS)
    for i in gl.static_range(STAGES if JOINED == 1 else 0):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_free.index(i), count=GROUPS)
    fence_async_shared()
    if EARLY:
        wait()
    rings = (x_ring, ring, words_full, words_free, x_full, x_free)
    sizes = (M, N, outputs, stride, turns)
    if GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (scales, zeros, bias, out, parts, counters, rings, sizes, 0, GROUPS, BITS, BN, BM, STAGES,
                         JOINED, AHEAD, WIDTH, SHARED, SYMMETRIC, HAS_BIAS, LATE)),
            (_multiply, (scales, zeros, bias, out, parts, counters, rings, sizes, 1, GROUPS, BITS, BN, BM, STAGES,
                         JOINED, AHEAD, WIDTH, SHARED, SYMMETRIC, HAS_BIAS, LATE)),
            (_fetch, (x, words, rings, sizes, BITS, GROUPS, BN, BM, STAGES, JOINED, AHEAD, WIDTH, SHARED, EARLY)),
        ], [4, 1], [232, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (scales, zeros, bias, out, parts, counters, rings, sizes, 0, GROUPS, BITS, BN, BM, STAGES,
                         JOINED, AHEAD, WIDTH, SHARED, SYMMETRIC, HAS_BIAS, LATE)),
            (_multiply, (scales, zeros, bias, out, parts, counters, rings, sizes, 1, GROUPS, BITS, BN, BM, STAGES,
                         JOINED, AHEAD, WIDTH, SHARED, SYMMETRIC, HAS_BIAS, LATE)),
            (_multiply, (scales, zeros, bias, out, parts, counters, rings, sizes, 2, GROUPS, BITS, BN, BM, STAGES,
                         JOINED, AHEAD, WIDTH, SHARED, SYMMETRIC, HAS_BIAS, LATE)),
            (_multiply, (scales, zeros, bias, out, parts, counters, rings, sizes, 3, GROUPS, BITS, BN, BM, STAGES,
                         JOINED, AHEAD, WIDTH, SHARED, SYMMETRIC, HAS_BIAS, LATE)),
            (_fetch, (x, words, rings, sizes, BITS, GROUPS, BN, BM, STAGES, JOINED, AHEAD, WIDTH, SHARED, EARLY)),
        ], [4, 4, 4, 1], [112, 112, 112, 32])  # fmt: skip


def takes(layout: Layout, dtype: torch.dtype) -> bool:
    """True for less than 8 bits, 128 channels a group, and x in float16 or bfloat16, rows a multiple of 16 bytes."""
    half = dtype in (torch.float16, torch.bfloat16)
    return half and layout.n_in % 8 == 0 and layout.bits < 8 and layout.group == 128


def many_rows(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, GROUPS: int = 2, BN: int = 64, BM: int = 256, STAGES: int = 5, JOINED: int = 1, AHEAD: int = 2, WIDTH: int = 2,
    SPLIT: int = 1, EARLY: int = 0,
) -> None:  # fmt: skip
    """Writes x Wᵀ + bias, accumulated in float32, with weights rounded once to x's dtype.

    Args:
        x: [M, in] at a multiple of 16 bytes, contiguous, its channels in the weight's order; see `takes`.
        layout, arranged: The weight.
        bias: [out], any floating dtype, or None.
        out: [M, out] in x's dtype, contiguous.
        workspace: Of the current stream.
        GROUPS, BN, BM: Groups of four warps that multiply, 2 or 4, outputs of a tile that each has, and a tile's rows.
        STAGES: Length of the ring of buffers for x: 3 at least with JOINED of 1, as the next words come after all of a
            turn's x, and are waited for when the first of its four buffers alone is free again.
        JOINED: Channels of x in such a buffer, in 64: 1, or 4, which are filled and freed with the words of the same
            channels; STAGES is then AHEAD.
        AHEAD: Length of the ring for words, of 256 channels each.
        WIDTH: Columns of tiles in a band.
        SPLIT: Above 1, so many programs for every tile, but no more than the GPU takes at a time, have equal parts of
            the channels of all tiles.
        EARLY: See `few_rows.few_rows`.
    """
    narrow = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    wide = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    words, stride, channels = arranged.words, arranged.stride, wide_of(layout.bits)
    flat = words.as_strided(((len(words) - 1) * stride + layout.outputs, layout.lanes), (layout.lanes, 1))
    tiles = triton.cdiv(len(x), BM) * triton.cdiv(layout.outputs, GROUPS * BN)
    turns = layout.steps * (1 + layout.halves)
    most = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(tiles * min(SPLIT, turns), most)  # each has a turn at least
    parts, counters = workspace.of(GROUPS * tiles, 2 * programs * GROUPS * BN * BM) if SPLIT > 1 else (out, out)
    _many_rows_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [BM, channels], narrow if channels == _LANES else wide),
        TensorDescriptor.from_tensor(flat, [BN, _LANES], narrow),
        arranged.scales, arranged.zeros, bias, out, parts, counters, len(x), layout.n_out, layout.outputs, stride,
        turns, BITS=layout.bits, GROUPS=GROUPS, BN=BN, BM=BM, STAGES=STAGES, JOINED=JOINED, AHEAD=AHEAD, WIDTH=WIDTH,
        SHARED=SPLIT > 1, SYMMETRIC=layout.symmetric, HAS_BIAS=bias is not None,
        LATE=_SCALED_LATE[layout.bits] >= BM, EARLY=EARLY, num_warps=4, **launch(EARLY),
    )  # fmt: skip
