"""x Wᵀ for many rows on Hopper, in Gluon: 4, 3 and 2 bits, groups of 128 channels here.

A program for every multiprocessor goes through the tiles of the result. One of its warps has the copy engine fetch
words and x into two rings of buffers in shared memory; two or four groups of four warps expand words into weights in
registers, rounded once to x's dtype, while the tensor cores multiply those before. In plain Triton the compiler waits
for every product of weights that lie in registers, which costs a third. What bounds 256 rows is the L2 cache, from
which every tile's program reads all of x.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RUF005  (Triton has no unpacking)
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
from .codes import ptx, start
from .in_turn import launch, let_go, wait
from .layout import Arranged, Layout, pieces
from .tiles import own, place, store_sum
from .workspace import Workspace

_pieces = triton.constexpr_function(pieces)
_SCALED_LATE = 32  # rows up to which it takes less to scale sums than weights
_LANES = 32  # whose weights are multiplied at a time, a part: more spill


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
def _weights(
    lower, upper, scales, zeros, kind,
    PART: gl.constexpr, BITS: gl.constexpr, BF16: gl.constexpr, SYMMETRIC: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """A part's weights in the dtype of `kind`, of a turn's words [n, 32] and of the pairs [n] of scales and zeros; if
    LATE, its codes less their zeros."""
    PLANE: gl.constexpr = PART if BITS == 3 else PART // 2
    CODE: gl.constexpr = ptx(PLANE, BITS, BF16, SYMMETRIC) if LATE else _ptx_scaled(PLANE, BITS, BF16, SYMMETRIC)
    if BITS == 3:
        operands = (lower,) if PLANE < 5 else (upper,) if PLANE < 7 else (upper, lower)
    else:
        operands = (upper,) if PART % 2 else (lower,)
    if not SYMMETRIC:
        START: gl.constexpr = start(PLANE, BITS, BF16)
        bits = (START[0] + (_of_pair(zeros, PART // 4) << START[1])).to(gl.int16)
        operands = operands + (gl.expand_dims(bits.to(kind.dtype, bitcast=True), 1),)
    if not LATE:
        scale = _of_pair(scales, PART // 4).to(gl.int16).to(gl.float16, bitcast=True)
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


@gluon.jit
def _of_pair(pairs, SECOND: gl.constexpr):
    return (pairs >> 16) & 0xFFFF if SECOND else pairs & 0xFFFF


@gluon.jit
def _fetch(
    x, words, rings, sizes,
    BITS: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    JOINED: gl.constexpr, AHEAD: gl.constexpr, WIDTH: gl.constexpr, SHARED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    x_ring, ring, words_full, words_free, x_full, x_free = rings
    M, _, outputs, stride, turns = sizes
    turn = 0
    tiles = gl.cdiv(M, BM) * gl.cdiv(outputs, GROUPS * BN)
    start, stop, distance, first, end = own(tiles, turns, SHARED)
    for tile in range(start, stop, distance):
        n, m = place(tile, M, outputs, GROUPS * BN, BM, WIDTH)
        for at in range(gl.maximum(first - tile * turns, 0), gl.minimum(end - tile * turns, turns)):
            stage = turn % AHEAD
            mbarrier.wait(words_free.index(stage), turn // AHEAD & 1 ^ 1)
            mbarrier.expect(words_full.index(stage), GROUPS * BN * 64 * 2)
            for i in gl.static_range(2 * GROUPS):  # two tiles of each group of warps
                if BITS == 3:  # of the half, and of both halves
                    tile_of_words = at // 2 * 3 + (2 if i % 2 else at % 2)
                else:  # lower and upper lanes
                    tile_of_words = at if BITS == 4 else at // 2
                corner = [tile_of_words * stride + n + i // 2 * BN, 0 if BITS == 3 else i % 2 * 32]
                buffer = ring.index(2 * GROUPS * stage + i)
                tma.async_copy_global_to_shared(words, corner, words_full.index(stage), buffer)
            for plane in gl.static_range(4):
                of_x = turn * (4 // JOINED) + plane // JOINED
                if plane % JOINED == 0:
                    mbarrier.wait(x_free.index(of_x % STAGES), of_x // STAGES & 1 ^ 1)
                    mbarrier.expect(x_full.index(of_x % STAGES), JOINED * BM * 64 * 2)
                buffer = x_ring.index(of_x % STAGES * JOINED + plane % JOINED)
                tma.async_copy_global_to_shared(x, [m, at * 256 + 64 * plane], x_full.index(of_x % STAGES), buffer)
            turn += 1
    if EARLY:
        let_go()


@gluon.jit
def _moved(words, distance):
    """`codes.moved`."""
    CODE: gl.constexpr = "shr.u32 $0, $1, $2;"
    return gl.inline_asm_elementwise(CODE, "=r,r,r,r", [words, distance], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def _words(
    ring, turn, at, SECOND: gl.constexpr,
    INDEX: gl.constexpr, GROUPS: gl.constexpr, BITS: gl.constexpr, AHEAD: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """A tile of words of a turn in registers, with the half's codes where those of the first half lie."""
    words = ring.index(2 * (turn % AHEAD * GROUPS + INDEX) + SECOND).load(A)
    if BITS == 2 or (BITS == 3 and SECOND):
        words = _moved(words, at % 2 * 8)
    return words


@gluon.jit
def _scaled(acc, total, scales, SECOND: gl.constexpr):
    scale = _of_pair(scales, SECOND).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return acc + total * gl.expand_dims(scale, 1)


@gluon.jit
def _turn(
    acc, total, lower, a, before, s, z, next_s, next_z, kind, rings, turn, at, high, INDEX: gl.constexpr,
    GROUPS: gl.constexpr, BITS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    JOINED: gl.constexpr, AHEAD: gl.constexpr, BF16: gl.constexpr, SYMMETRIC: gl.constexpr, LATE: gl.constexpr,
    A: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """A turn's products of 256 channels in eight parts: the sums, and what the next turn begins with."""
    x_ring, ring, words_full, words_free, x_full, x_free = rings
    upper = _words(ring, turn, at, 1, INDEX, GROUPS, BITS, AHEAD, A)
    for part in gl.static_range(8):
        of_x = turn * (4 // JOINED) + part // 2 // JOINED
        buffer = x_ring.index(of_x % STAGES * JOINED + part // 2 % JOINED)
        x = buffer.slice(part % 2 * 32, 32, dim=1).permute((1, 0))
        if LATE and part % 4 == 0:
            token = warpgroup_mma(a, x, gl.zeros([BN, BM], gl.float32, L), use_acc=False, is_async=True)
        else:
            token = warpgroup_mma(a, x, total if LATE else acc, is_async=True)
        multiplied = a
        of_part = s
        # The next weights are expanded while the tensor cores multiply these and those before. None are on
        # their way when the loop turns: the compiler would then wait for each.
        if part < 7:
            a = _weights(lower, upper, s, z, kind, part + 1, BITS, BF16, SYMMETRIC, LATE)
        else:
            s = next_s
            z = next_z
            following_turn = turn + 1
            mbarrier.wait(words_full.index(following_turn % AHEAD), following_turn // AHEAD & 1, pred=at + 1 < high)
            lower = _words(ring, following_turn, at + 1, 0, INDEX, GROUPS, BITS, AHEAD, A)
            a = _weights(lower, lower, s, z, kind, 0, BITS, BF16, SYMMETRIC, LATE)
        if part % (2 * JOINED) == 2 * JOINED - 1:
            more = (part < 7) | (at + 1 < high)
            mbarrier.wait(x_full.index((of_x + 1) % STAGES), (of_x + 1) // STAGES & 1, pred=more)
        if part == 0:
            done = token
        elif part == 4 and LATE:
            done, total, before, a = warpgroup_mma_wait(1, deps=[token, total, before, a])
            acc = _scaled(acc, total, of_part, False)
        elif part < 7:
            done, before, a = warpgroup_mma_wait(1, deps=[token, before, a])
        else:
            done, multiplied, a = warpgroup_mma_wait(0, deps=[token, multiplied, a])
            mbarrier.arrive(x_free.index(of_x % STAGES), count=1)
            # Not once they are loaded, but once all have been used: a barrier does not wait for words that are
            # on their way to registers, and the copy engine may be there before they are read.
            mbarrier.arrive(words_free.index(turn % AHEAD), count=1)
            if LATE:
                acc = _scaled(acc, done, of_part, True)
        if part > 0 and part % (2 * JOINED) == 0:
            mbarrier.arrive(x_free.index((of_x + STAGES - 1) % STAGES), count=1)
        if LATE:
            total = done
        else:
            acc = done
        before = multiplied
    return acc, total, lower, a, before, s, z


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
        s = gl.load(scales + low * stride + of_s)
        z = s if SYMMETRIC else gl.load(zeros + low * stride + n)
        mbarrier.wait(words_full.index(turn % AHEAD), turn // AHEAD & 1)
        lower = _words(ring, turn, low, 0, INDEX, GROUPS, BITS, AHEAD, A)
        a = _weights(lower, lower, s, z, kind, 0, BITS, BF16, SYMMETRIC, LATE)
        before = a
        of_x = turn * (4 // JOINED)
        mbarrier.wait(x_full.index(of_x % STAGES), of_x // STAGES & 1)
        for at in range(low, high):
            following = gl.minimum(at + 1, high - 1) * stride
            next_s = gl.load(scales + following + of_s)
            next_z = next_s if SYMMETRIC else gl.load(zeros + following + n)
            acc, total, lower, a, before, s, z = _turn(
                acc, total, lower, a, before, s, z, next_s, next_z, kind, rings, turn, at, high, INDEX,
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
    ring = gl.allocate_shared_memory(gl.int16, [2 * GROUPS * AHEAD, BN, 32], words.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * JOINED, BM, 64], x.layout)
    words_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    words_free = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(AHEAD):
        mbarrier.init(words_full.index(i), count=1)
        mbarrier.init(words_free.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
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
        STAGES: Length of the ring of buffers for x.
        JOINED: Channels of x in such a buffer, in 64.
        AHEAD: Length of the ring for words, of 256 channels each.
        WIDTH: Columns of tiles in a band.
        SPLIT: Above 1, so many programs for every tile, but no more than the GPU takes at a time, have equal parts of
            the channels of all tiles.
        EARLY: See `few_rows.few_rows`.
    """
    shared = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    wide = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    words, stride = arranged.words, arranged.stride
    flat = words.as_strided(((len(words) - 1) * stride + layout.outputs, layout.lanes), (layout.lanes, 1))
    tiles = triton.cdiv(len(x), BM) * triton.cdiv(layout.outputs, GROUPS * BN)
    turns = layout.steps * (1 + layout.halves)
    most = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(tiles * min(SPLIT, turns), most)  # each has a turn at least
    parts, counters = workspace.of(GROUPS * tiles, 2 * programs * GROUPS * BN * BM) if SPLIT > 1 else (out, out)
    _many_rows_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [BM, 64], wide), TensorDescriptor.from_tensor(flat, [BN, _LANES], shared),
        arranged.scales, arranged.zeros, bias, out, parts, counters, len(x), layout.n_out, layout.outputs, stride,
        turns, BITS=layout.bits, GROUPS=GROUPS, BN=BN, BM=BM, STAGES=STAGES, JOINED=JOINED, AHEAD=AHEAD, WIDTH=WIDTH,
        SHARED=SPLIT > 1, SYMMETRIC=layout.symmetric, HAS_BIAS=bias is not None, LATE=BM <= _SCALED_LATE, EARLY=EARLY,
        num_warps=4, **launch(EARLY),
    )  # fmt: skip
