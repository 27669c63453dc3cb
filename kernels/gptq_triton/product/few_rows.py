"""x Wᵀ for few rows: the weights are the wide side of the tensor cores' product, and stay in registers.

A tile of words is loaded as it lies, expanded plane by plane (`codes`) and multiplied with the plane's channels of x;
a group's sum is scaled in float32. Where tiles are too few for the GPU, several programs share one, each with a part
of the channels, and the last of them adds the parts in order: deterministic, in one launch.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from torch import Tensor

from ..needs_triton import tl, triton
from .in_turn import announce, launch, let_go, wait
from .layout import Arranged, Layout
from .step import add_step
from .workspace import Workspace


@triton.jit
def store_sum(
    acc, bias, out, parts, counters, n, m, M, N, tile, part,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Stores a tile [BN, BM] of the result, transposed; with SPLIT > 1 the last program to come adds all parts."""
    inside = (m < M)[None, :] & (n < N)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    last = True
    if SPLIT > 1:
        own = parts + tile.to(tl.int64) * (SPLIT * BN * BM) + tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
        tl.store(own + part * (BN * BM), acc, mask=(m < M)[None, :])
        tl.debug_barrier()  # every thread's stores come before the count
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.zeros((BN, BM), tl.float32)
            for i in tl.static_range(SPLIT):
                acc += tl.load(own + i * (BN * BM), mask=(m < M)[None, :], other=0, cache_modifier=".cg")
            tl.store(counters + tile, 0)  # ready for the next product
    if last:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x, words, scales, zeros, bias, out, parts, counters, M, N, K, stride, steps,
    BITS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, HALF: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    pn, part, pm = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = pn * BN + tl.arange(0, BN)
    m = pm * BM + tl.arange(0, BM)
    at = n[:, None] * LANES + tl.arange(0, LANES)[None, :]
    lane = tl.arange(0, JOINED * LANES)[None, :]
    row = x + m.to(tl.int64)[:, None] * K + lane
    there = (m < M)[:, None]
    turns = steps * (1 + HALF)
    if EARLY:
        for i in tl.static_range(EARLY - 2):
            early = part * turns // SPLIT // (1 + HALF) + i
            if early * (1 + HALF) < (part + 1) * turns // SPLIT:
                announce(
                    words, scales, zeros, early, pn * BN, stride, BITS, LANES, PLANES, BLOCKS, GROUP, SYMMETRIC, BN
                )
        wait()
        if EARLY > 1:
            let_go()
    acc = tl.zeros((BN, BM), tl.float32)
    for turn in tl.range(part * turns // SPLIT, (part + 1) * turns // SPLIT, num_stages=STAGES):
        acc = add_step(
            acc, row, words, scales, zeros, turn // (1 + HALF), turn % (1 + HALF), steps, at, n, there, lane, K, stride,
            BITS, LANES, PLANES, BLOCKS, GROUP, SYMMETRIC, WHOLE, HALF, JOINED,
        )  # fmt: skip
    if EARLY == 1:
        let_go()
    store_sum(acc, bias, out, parts, counters, n, m, M, N, pm * tl.num_programs(0) + pn, part, HAS_BIAS, BN, BM, SPLIT)


def few_rows(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, BN: int = 64, BM: int = 16, SPLIT: int = 1, STAGES: int = 3, warps: int = 2, EARLY: int = 0, HALF: int = 0,
    JOINED: int = 1,
) -> None:  # fmt: skip
    """Writes x Wᵀ + bias, accumulated in float32.

    Args:
        x: float16, bfloat16 or float32 [M, in], contiguous, its channels in the weight's order.
        layout, arranged: The weight.
        bias: [out], any floating dtype, or None.
        out: [M, out] in x's dtype, contiguous.
        workspace: Of the current stream.
        BN, BM: Outputs and rows of a tile.
        SPLIT: Programs that share a tile.
        STAGES: Depth of the pipeline of loads.
        warps: Of a program.
        EARLY: 1 to begin while a product before ends, and let one after it do so; 2 or more to let it once this one has
            begun, with the words of EARLY - 2 steps fetched into the L2 cache before. See `in_turn`.
        HALF: 1 to multiply half of a step at a time, where `layout.halves`: words are read twice, from the L2 cache
            the second time, and a stage has half as many channels of x.
        JOINED: 2 to multiply two planes of less than 8 bits at a time, for four or more warps on Hopper: the compiler
            waits for every product of weights that lie in registers.
    """
    rows = len(x)
    tiles = layout.outputs // BN * triton.cdiv(rows, BM)
    parts, counters = workspace.of(tiles, tiles * SPLIT * BN * BM) if SPLIT > 1 else (out, out)
    _few_rows_kernel[(layout.outputs // BN, SPLIT, triton.cdiv(rows, BM))](
        x, arranged.words, arranged.scales, arranged.zeros, bias, out, parts, counters,
        rows, layout.n_out, layout.n_in, arranged.stride, layout.steps,
        BITS=layout.bits, LANES=layout.lanes, PLANES=layout.planes, BLOCKS=layout.blocks_a_step, GROUP=layout.group,
        SYMMETRIC=layout.symmetric, HAS_BIAS=bias is not None, WHOLE=layout.n_in % layout.step == 0,
        BN=BN, BM=BM, SPLIT=SPLIT, STAGES=STAGES, EARLY=EARLY, HALF=HALF, JOINED=JOINED,
        num_warps=warps, num_stages=STAGES, **launch(EARLY),
    )  # fmt: skip
