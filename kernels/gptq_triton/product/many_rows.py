"""x Wᵀ for many rows on Hopper, in Gluon: 4, 3 and 2 bits, groups of 128 channels here.

A program for every multiprocessor goes through the tiles of the result. One of its warps has the copy engine fetch
words and x into two rings of buffers in shared memory; two groups of four warps expand words into weights in registers,
rounded once to x's dtype, while the tensor cores multiply those before. In plain Triton the compiler waits for every
product of weights that lie in registers, which costs a third. What bounds 256 rows is the L2 cache, from which every
tile's program reads all of x.

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
from .workspace import Workspace

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7 renamed it

_BN = 64  # outputs of each of the two groups of warps, of a tile
_pieces = triton.constexpr_function(pieces)
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
    PART: gl.constexpr, BITS: gl.constexpr, BF16: gl.constexpr, SYMMETRIC: gl.constexpr,
):  # fmt: skip
    """A part's weights in the dtype of `kind`, of a turn's words [n, 32] and of the pairs [n] of scales and zeros."""
    PLANE: gl.constexpr = PART if BITS == 3 else PART // 2
    CODE: gl.constexpr = _ptx_scaled(PLANE, BITS, BF16, SYMMETRIC)
    scale = _of_pair(scales, PART // 4).to(gl.int16).to(gl.float16, bitcast=True)
    if BITS == 3:
        operands = (lower,) if PLANE < 5 else (upper,) if PLANE < 7 else (upper, lower)
    else:
        operands = (upper,) if PART % 2 else (lower,)
    if not SYMMETRIC:
        START: gl.constexpr = start(PLANE, BITS, BF16)
        bits = (START[0] + (_of_pair(zeros, PART // 4) << START[1])).to(gl.int16)
        operands = operands + (gl.expand_dims(bits.to(kind.dtype, bitcast=True), 1),)
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
def _place(tile, M, outputs, BN: gl.constexpr, BM: gl.constexpr, WIDTH: gl.constexpr):
    """(n, m) of a tile: columns of tiles in bands of WIDTH, so that programs at work share words and rows of x."""
    down, across = gl.cdiv(M, BM), gl.cdiv(outputs, BN)
    first = tile // (WIDTH * down) * WIDTH
    width = gl.minimum(across - first, WIDTH)
    within = tile % (WIDTH * down)
    return (first + within % width) * BN, within // width * BM


@gluon.jit
def _fetch(
    x, words, x_ring, ring, words_full, words_free, x_full, x_free, M, outputs, turns, BITS: gl.constexpr,
    BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, WIDTH: gl.constexpr,
    SPLIT: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    turn = 0
    tiles = gl.cdiv(M, BM) * gl.cdiv(outputs, 2 * BN) * SPLIT
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, m = _place(tile // SPLIT, M, outputs, 2 * BN, BM, WIDTH)
        for at in range(tile % SPLIT * turns // SPLIT, (tile % SPLIT + 1) * turns // SPLIT):
            stage = turn % AHEAD
            mbarrier.wait(words_free.index(stage), turn // AHEAD & 1 ^ 1)
            mbarrier.expect(words_full.index(stage), 2 * BN * 64 * 2)
            for i in gl.static_range(4):  # two tiles of each group of warps
                if BITS == 3:  # of the half, and of both halves
                    tile_of_words = at // 2 * 3 + (2 if i % 2 else at % 2)
                else:  # lower and upper lanes
                    tile_of_words = at if BITS == 4 else at // 2
                place = [tile_of_words * outputs + n + i // 2 * BN, 0 if BITS == 3 else i % 2 * 32]
                tma.async_copy_global_to_shared(words, place, words_full.index(stage), ring.index(4 * stage + i))
            for plane in gl.static_range(4):
                of_x = 4 * turn + plane
                mbarrier.wait(x_free.index(of_x % STAGES), of_x // STAGES & 1 ^ 1)
                mbarrier.expect(x_full.index(of_x % STAGES), BM * 64 * 2)
                tma.async_copy_global_to_shared(
                    x, [m, at * 256 + 64 * plane], x_full.index(of_x % STAGES), x_ring.index(of_x % STAGES)
                )
            turn += 1
    if EARLY:
        let_go()


@gluon.jit
def _store(acc, bias, out, n, m, M, N, HAS_BIAS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, L: gl.constexpr):
    if HAS_BIAS:
        columns = n + gl.arange(0, BN, gl.SliceLayout(1, L))
        acc += gl.expand_dims(gl.load(bias + columns, mask=columns < N, other=0).to(gl.float32), 1)
    S: gl.constexpr = gl.BlockedLayout([8, 1], [BN // 8, 256 // BN], [1, 4], [0, 1])
    y = gl.convert_layout(acc.to(out.dtype.element_ty), S)
    row = m + gl.arange(0, BM, gl.SliceLayout(0, S))
    column = n + gl.arange(0, BN, gl.SliceLayout(1, S))
    at = out + row.to(gl.int64)[None, :] * N + column[:, None]
    gl.store(at, y, mask=(row < M)[None, :] & (column < N)[:, None])


@gluon.jit
def _store_sum(
    acc, bias, out, parts, counters, slot, part, n, m, M, N,
    HAS_BIAS: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, SPLIT: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Of programs that share a tile, the last adds all parts, in order."""
    if SPLIT == 1:
        _store(acc, bias, out, n, m, M, N, HAS_BIAS, BN, BM, L)
    else:
        own = parts + slot * (SPLIT * BN * BM)
        own += gl.arange(0, BN, gl.SliceLayout(1, L))[:, None] * BM + gl.arange(0, BM, gl.SliceLayout(0, L))[None, :]
        gl.store(own + part * (BN * BM), acc)
        _barrier()
        if gl.atomic_add(counters + slot, 1, sem="acq_rel") == SPLIT - 1:
            total = gl.zeros([BN, BM], gl.float32, L)
            for i in gl.static_range(SPLIT):
                total += gl.load(own + i * (BN * BM), cache_modifier=".cg")
            _store(total, bias, out, n, m, M, N, HAS_BIAS, BN, BM, L)
            gl.store(counters + slot, 0)  # ready for the next product


@gluon.jit
def _moved(words, distance):
    """`codes.moved`."""
    CODE: gl.constexpr = "shr.u32 $0, $1, $2;"
    return gl.inline_asm_elementwise(CODE, "=r,r,r,r", [words, distance], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def _words(ring, full, turn, at, HALF: gl.constexpr, BITS: gl.constexpr, AHEAD: gl.constexpr, A: gl.constexpr):
    """The two tiles of words of a turn in registers, with the half's codes where those of the first half lie."""
    mbarrier.wait(full.index(turn % AHEAD), turn // AHEAD & 1)
    lower = ring.index(4 * (turn % AHEAD) + 2 * HALF).load(A)
    upper = ring.index(4 * (turn % AHEAD) + 2 * HALF + 1).load(A)
    if BITS == 2:
        lower = _moved(lower, at % 2 * 8)
    if BITS < 4:
        upper = _moved(upper, at % 2 * 8)
    return lower, upper


@gluon.jit
def _multiply(
    scales, zeros, bias, out, parts, counters, x_ring, ring, words_full, words_free, x_full, x_free,
    M, N, outputs, turns, HALF: gl.constexpr, BITS: gl.constexpr,
    BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, WIDTH: gl.constexpr,
    SPLIT: gl.constexpr, SYMMETRIC: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, A)
    BF16: gl.constexpr = out.dtype.element_ty == gl.bfloat16
    kind = gl.zeros([BN], out.dtype.element_ty, R)
    turn = 0
    tiles = gl.cdiv(M, BM) * gl.cdiv(outputs, 2 * BN) * SPLIT
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n0, m0 = _place(tile // SPLIT, M, outputs, 2 * BN, BM, WIDTH)
        first = tile % SPLIT * turns // SPLIT
        end = (tile % SPLIT + 1) * turns // SPLIT
        n = gl.minimum(n0 + HALF * BN + gl.arange(0, BN, R), outputs - 1)
        acc = gl.zeros([BN, BM], gl.float32, L)
        s = gl.load(scales + first * outputs + n)
        z = s if SYMMETRIC else gl.load(zeros + first * outputs + n)
        lower, upper = _words(ring, words_full, turn, first, HALF, BITS, AHEAD, A)
        a = _weights(lower, upper, s, z, kind, 0, BITS, BF16, SYMMETRIC)
        before = a
        mbarrier.wait(x_full.index(4 * turn % STAGES), 4 * turn // STAGES & 1)
        for at in range(first, end):
            following = gl.minimum(at + 1, end - 1) * outputs + n
            next_s = gl.load(scales + following)
            next_z = next_s if SYMMETRIC else gl.load(zeros + following)
            for part in gl.static_range(8):
                of_x = 4 * turn + part // 2
                x = x_ring.index(of_x % STAGES).slice(part % 2 * 32, 32, dim=1).permute((1, 0))
                token = warpgroup_mma(a, x, acc, is_async=True)
                multiplied = a
                # The next weights are expanded while the tensor cores multiply these and those before. None are on
                # their way when the loop turns: the compiler would then wait for each.
                if part < 7:
                    a = _weights(lower, upper, s, z, kind, part + 1, BITS, BF16, SYMMETRIC)
                else:
                    s = next_s
                    z = next_z
                    if at + 1 < end:
                        lower, upper = _words(ring, words_full, turn + 1, at + 1, HALF, BITS, AHEAD, A)
                    a = _weights(lower, upper, s, z, kind, 0, BITS, BF16, SYMMETRIC)
                if part % 2:
                    more = (part < 7) | (at + 1 < end)
                    mbarrier.wait(x_full.index((of_x + 1) % STAGES), (of_x + 1) // STAGES & 1, pred=more)
                if part == 0:
                    acc = token
                elif part < 7:
                    acc, before, a = warpgroup_mma_wait(1, deps=[token, before, a])
                    if part % 2 == 0:
                        mbarrier.arrive(x_free.index((of_x + STAGES - 1) % STAGES), count=1)
                else:
                    acc, multiplied, a = warpgroup_mma_wait(0, deps=[token, multiplied, a])
                    mbarrier.arrive(x_free.index(of_x % STAGES), count=1)
                    # Not once they are loaded, but once all have been used: a barrier does not wait for words that are
                    # on their way to registers, and the copy engine may be there before they are read.
                    mbarrier.arrive(words_free.index(turn % AHEAD), count=1)
                before = multiplied
            turn += 1
        slot, n0 = tile // SPLIT * 2 + HALF, n0 + HALF * BN
        _store_sum(acc, bias, out, parts, counters, slot, tile % SPLIT, n0, m0, M, N, HAS_BIAS, BN, BM, SPLIT, L)


@gluon.jit(do_not_specialize=["M"])
def _many_rows_kernel(
    x, words, scales, zeros, bias, out, parts, counters, M, N, outputs, turns, BITS: gl.constexpr,
    BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, WIDTH: gl.constexpr,
    SPLIT: gl.constexpr, SYMMETRIC: gl.constexpr, HAS_BIAS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    if EARLY:
        wait()
    ring = gl.allocate_shared_memory(gl.int16, [4 * AHEAD, BN, 32], words.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BM, 64], x.layout)
    words_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    words_free = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(AHEAD):
        mbarrier.init(words_full.index(i), count=1)
        mbarrier.init(words_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            scales, zeros, bias, out, parts, counters, x_ring, ring, words_full, words_free, x_full, x_free,
            M, N, outputs, turns, 0, BITS, BN, BM, STAGES, AHEAD, WIDTH, SPLIT, SYMMETRIC, HAS_BIAS,
        )),
        (_multiply, (
            scales, zeros, bias, out, parts, counters, x_ring, ring, words_full, words_free, x_full, x_free,
            M, N, outputs, turns, 1, BITS, BN, BM, STAGES, AHEAD, WIDTH, SPLIT, SYMMETRIC, HAS_BIAS,
        )),
        (_fetch, (
            x, words, x_ring, ring, words_full, words_free, x_full, x_free, M, outputs, turns, BITS,
            BN, BM, STAGES, AHEAD, WIDTH, SPLIT, EARLY,
        )),
    ], [4, 1], [232, 40])  # fmt: skip


def takes(layout: Layout, dtype: torch.dtype) -> bool:
    """True for less than 8 bits, 128 channels a group, and x in float16 or bfloat16, rows a multiple of 16 bytes."""
    half = dtype in (torch.float16, torch.bfloat16)
    return half and layout.n_in % 8 == 0 and layout.bits < 8 and layout.group == 128


def many_rows(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, BM: int = 256, STAGES: int = 5, AHEAD: int = 2, WIDTH: int = 2, SPLIT: int = 1, EARLY: int = 0,
) -> None:  # fmt: skip
    """Writes x Wᵀ + bias, accumulated in float32, with weights rounded once to x's dtype.

    Args:
        x: [M, in] at a multiple of 16 bytes, contiguous, its channels in the weight's order; see `takes`.
        layout, arranged: The weight.
        bias: [out], any floating dtype, or None.
        out: [M, out] in x's dtype, contiguous.
        workspace: Of the current stream.
        BM: Rows of a tile of 128 outputs.
        STAGES: Length of the ring of buffers for x, of 64 channels each.
        AHEAD: That of the ring for words, of 256.
        WIDTH: Columns of tiles in a band.
        SPLIT: Programs that share a tile.
        EARLY: See `few_rows.few_rows`.
    """
    shared = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    wide = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    flat = arranged.words.view(-1, layout.lanes)
    tiles = triton.cdiv(len(x), BM) * triton.cdiv(layout.outputs, 2 * _BN)
    parts, counters = workspace.of(2 * tiles, tiles * SPLIT * 2 * _BN * BM) if SPLIT > 1 else (out, out)
    programs = min(tiles * SPLIT, torch.cuda.get_device_properties(x.device).multi_processor_count)
    _many_rows_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [BM, 64], wide), TensorDescriptor.from_tensor(flat, [_BN, _LANES], shared),
        arranged.scales, arranged.zeros, bias, out, parts, counters, len(x), layout.n_out, layout.outputs,
        layout.steps * (1 + layout.halves), BITS=layout.bits,
        BN=_BN, BM=BM, STAGES=STAGES, AHEAD=AHEAD, WIDTH=WIDTH, SPLIT=SPLIT, SYMMETRIC=layout.symmetric,
        HAS_BIAS=bias is not None, EARLY=EARLY, num_warps=4, **launch(EARLY),
    )  # fmt: skip
