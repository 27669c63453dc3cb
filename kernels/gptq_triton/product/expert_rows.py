"""x Wᵀ for rows sorted by expert, each expert with a weight of its own, in one launch: `expert_rows`.

The weights of all experts are one in the kernels' layout, whose outputs follow each other. A program takes some outputs
of an expert and some of its rows, and multiplies as `few_rows` does; it finds out whose by where the experts' rows end,
so that nothing waits for the GPU. Experts without rows take no program, and their weights are not read.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..needs_triton import tl, triton
from .layout import OUTPUTS, Arranged, Layout
from .step import add_step

_BN = 64  # outputs of a tile
_STAGES = 3
_WARPS = {8: 2, 16: 2, 32: 4}  # by the rows of a tile


@triton.jit(do_not_specialize=["experts"])
def _expert_rows_kernel(
    x, ends, words, scales, zeros, out, experts, width, K, stride, steps,
    BITS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, EXPERTS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    e = tl.arange(0, EXPERTS)
    stop = tl.load(ends + e, mask=e < experts, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = (stop - start + BM - 1) // BM
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= slot).to(tl.int32), 0)  # behind the last, of which there is no tile, all are
    if expert < experts:
        mine = e == expert
        within = slot - tl.sum(tl.where(mine, upto - tiles, 0), 0)
        first = tl.sum(tl.where(mine, start, 0), 0) + within * BM
        last = tl.sum(tl.where(mine, stop, 0), 0)
        column = tl.program_id(0) * BN + tl.arange(0, BN)
        n = expert * width + column
        m = first + tl.arange(0, BM)
        lane = tl.arange(0, LANES)[None, :]
        at = n[:, None] * LANES + lane
        row = x + m.to(tl.int64)[:, None] * K + lane
        there = (m < last)[:, None]
        acc = tl.zeros((BN, BM), tl.float32)
        for turn in tl.range(0, steps * (1 + HALF), num_stages=STAGES):
            acc = add_step(
                acc, row, words, scales, zeros, turn // (1 + HALF), turn % (1 + HALF), steps, at, n, there, lane, K,
                stride, BITS, LANES, PLANES, BLOCKS, GROUP, SYMMETRIC, WHOLE, HALF,
            )  # fmt: skip
        store = (m < last)[None, :] & (column < width)[:, None]
        tl.store(out + m.to(tl.int64)[None, :] * width + column[:, None], acc.to(out.dtype.element_ty), mask=store)


def expert_rows(x: Tensor, ends: Tensor, layout: Layout, arranged: Arranged, out: Tensor) -> None:
    """Writes x Wᵀ with each row's expert's weight, accumulated in float32; rows of no expert are left as they are.

    Args:
        x: float16, bfloat16 or float32 [rows, in], contiguous, its channels in the weights' order.
        ends: Where the experts' rows end, int32 [experts], contiguous.
        layout, arranged: The weights of all experts, expert after expert: a multiple of 64 outputs each.
        out: [rows, outputs of an expert] in x's dtype, contiguous.

    Raises:
        ValueError: Wrong dtype, shape or stride.
    """
    (rows, width), experts = out.shape, len(ends)
    _check(x, ends, layout, out)
    block = min(max(_WARPS), max(min(_WARPS), triton.next_power_of_2(-(-2 * rows // max(1, experts)))))
    slots = min(rows, experts) + rows // block
    if not slots:
        return
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _expert_rows_kernel[(width // _BN, slots)](
            x, ends, arranged.words, arranged.scales, arranged.zeros, out,
            experts, width, layout.n_in, arranged.stride, layout.steps,
            BITS=layout.bits, LANES=layout.lanes, PLANES=layout.planes, BLOCKS=layout.blocks_a_step,
            GROUP=layout.group, SYMMETRIC=layout.symmetric, WHOLE=layout.n_in % layout.step == 0,
            EXPERTS=triton.next_power_of_2(experts),
            BN=_BN, BM=block, STAGES=_STAGES, HALF=halves(layout, x.dtype, block),
            num_warps=_WARPS[block], num_stages=_STAGES,
        )  # fmt: skip


def halves(layout: Layout, dtype: torch.dtype, block: int) -> bool:
    """Halves of a step at a time: of 3 bits, a whole one takes more registers than two warps have."""
    return layout.bits == 3 and layout.halves and dtype != torch.float32 and _WARPS[block] == 2


def _check(x: Tensor, ends: Tensor, layout: Layout, out: Tensor) -> None:
    rows, width = out.shape
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or out.dtype != x.dtype:
        raise ValueError(f"x and out must be float16, bfloat16 or float32, got {x.dtype} and {out.dtype}")
    if x.shape != (rows, layout.n_in) or not x.is_contiguous() or not out.is_contiguous():
        raise ValueError(
            f"x must be contiguous [{rows}, {layout.n_in}], as many rows as of a contiguous out, got {list(x.shape)}"
        )
    if ends.dim() != 1 or ends.dtype != torch.int32 or not ends.is_contiguous():
        raise ValueError(f"ends must be contiguous int32 [experts], got {ends.dtype} {list(ends.shape)}")
    if width % OUTPUTS or width * len(ends) != layout.n_out:
        raise ValueError(
            f"{len(ends)} experts of {width} outputs, which must be a multiple of {OUTPUTS}, are not the weight's "
            f"{layout.n_out}"
        )
