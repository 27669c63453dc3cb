"""x Wᵀ for few rows where outputs are few: each warp of a program multiplies a part of the channels.

Like `few_rows`, but programs share no tile: a program's warps do, each with channels of its own, and their sums meet in
shared memory. That is over sooner than where programs wait for each other's parts.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from torch import Tensor

from ..needs_triton import tl, triton
from .few_rows import store_sum
from .in_turn import announce, launch, let_go, wait
from .layout import Arranged, Layout
from .step import add_step
from .workspace import Workspace


@triton.jit(do_not_specialize=["M"])
def _by_warps_kernel(
    x, words, scales, zeros, bias, out, M, N, K, stride, steps,
    BITS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    pn, pm = tl.program_id(0), tl.program_id(1)
    way = tl.arange(0, WAYS)[:, None]
    n = pn * BN + tl.arange(0, BN)
    m = pm * BM + tl.arange(0, BM)
    outputs = n[None, :]
    lane = tl.arange(0, LANES)[None, None, :]
    at = n[None, :, None] * LANES + lane
    row = x + m.to(tl.int64)[None, :, None] * K + lane
    there = (m < M)[None, :, None]
    if EARLY:
        for i in tl.static_range((EARLY - 2) * WAYS):
            if i < steps:
                announce(words, scales, zeros, i, pn * BN, stride, BITS, LANES, PLANES, BLOCKS, GROUP, SYMMETRIC, BN)
        wait()
        if EARLY > 1:
            let_go()
    acc = tl.zeros((WAYS, BN, BM), tl.float32)
    for turn in tl.range(0, tl.cdiv(steps, WAYS) * (1 + HALF), num_stages=STAGES):
        step = turn // (1 + HALF) * WAYS + way
        acc = add_step(
            acc, row, words, scales, zeros, step, turn % (1 + HALF), steps, at, outputs, there, lane, K, stride,
            BITS, LANES, PLANES, BLOCKS, GROUP, SYMMETRIC, WHOLE, HALF,
        )  # fmt: skip
    if EARLY == 1:
        let_go()
    store_sum(tl.sum(acc, 0), bias, out, out, out, n, m, M, N, 0, 0, HAS_BIAS, BN, BM, 1)


def by_warps(
    x: Tensor, layout: Layout, arranged: Arranged, bias: Tensor | None, out: Tensor, workspace: Workspace,
    *, BN: int = 16, BM: int = 8, WAYS: int = 4, STAGES: int = 3, EARLY: int = 0, HALF: int = 0,
) -> None:  # fmt: skip
    """Writes x Wᵀ + bias, accumulated in float32.

    Args:
        x: float16 or bfloat16 [M, in], contiguous, its channels in the weight's order.
        layout, arranged: The weight.
        bias: [out], any floating dtype, or None.
        out: [M, out] in x's dtype, contiguous.
        workspace: Not used.
        BN, BM: Outputs and rows of a tile.
        WAYS: Warps, each with every WAYS-th step of the channels.
        STAGES: Depth of the pipeline of loads.
        EARLY, HALF: See `few_rows.few_rows`.
    """
    rows = len(x)
    _by_warps_kernel[(layout.outputs // BN, triton.cdiv(rows, BM))](
        x, arranged.words, arranged.scales, arranged.zeros, bias, out,
        rows, layout.n_out, layout.n_in, arranged.stride, layout.steps,
        BITS=layout.bits, LANES=layout.lanes, PLANES=layout.planes, BLOCKS=layout.blocks_a_step, GROUP=layout.group,
        SYMMETRIC=layout.symmetric, HAS_BIAS=bias is not None, WHOLE=layout.n_in % layout.step == 0,
        BN=BN, BM=BM, WAYS=WAYS, STAGES=STAGES, EARLY=EARLY, HALF=HALF, num_warps=WAYS,
        num_stages=STAGES, **launch(EARLY),
    )  # fmt: skip
