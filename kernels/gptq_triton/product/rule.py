"""The kernel for a product by rule, which fits what was fastest on an H100, of 2 and 3 bits on an H200: `by_rule`.

From 65 rows on, on Hopper, it is `waves` that tells.
"""

from __future__ import annotations

import torch

from ..needs_triton import triton
from . import one_row
from .choice import Choice, Gpu
from .hopper import gluon
from .layout import OUTPUTS, Layout
from .waves import NARROW, tiles_for

FEW_ROWS = 64  # up to which the weights' bytes, not arithmetic, take the time
_ONE_ROW = 1 << 25  # weights up to which tensor cores start too slowly for one row
_PROGRAMS = 1.6  # for every multiprocessor: as many share the channels of a tile as it takes to have these


def by_rule(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> Choice:
    """The kernel for so many rows."""
    if rows == 1 and one_row.takes(layout, dtype) and layout.n_in * layout.outputs <= _ONE_ROW:
        chunks = 128 if layout.outputs < 16 * gpu.processors else 64
        return Choice.of("one_row", CHUNKS=chunks, EARLY=int(gpu.hopper))
    if rows <= FEW_ROWS:
        options = few(layout, rows, dtype, gpu)
        shared = options["SPLIT"] == 4 and rows <= 8 and layout.bits != 3 and dtype != torch.float32
        if shared and gpu.hopper:
            return Choice.of("by_warps", **warps(rows, gpu))
        if options["BM"] == 64 and takes_many(layout, dtype, gpu):
            if _fills(layout, 256, gpu):
                four = {"GROUPS": 4, "BN": 64} if layout.bits < 4 and layout.symmetric else {}
                return Choice.of("many_rows", **wide(rows) | {"SPLIT": 1} | four)
            if _fills(layout, 128, gpu):
                return Choice.of("many_rows", **NARROW)
        return Choice.of("few_rows", **options)
    if not takes_many(layout, dtype, gpu):
        return Choice("dense")
    tiles = tiles_for(layout, rows, gpu)
    if tiles is None:
        return Choice.of("few_rows", **few(layout, rows, dtype, gpu))
    return Choice.of("many_rows", **tiles)


def takes_many(layout: Layout, dtype: torch.dtype, gpu: Gpu) -> bool:
    """True if `many_rows` takes a product on a GPU."""
    module = gluon() if gpu.hopper else None
    return module is not None and bool(module.takes(layout, dtype))


def few(layout: Layout, rows: int, dtype: torch.dtype, gpu: Gpu) -> dict[str, int]:
    """Options of `few_rows`; fits weights of 4096 to 28672 outputs."""
    block = min(64, max(8, triton.next_power_of_2(rows)))
    stages = 3
    while block > 8 and _shared(layout, dtype, OUTPUTS, block, 2, gpu) > gpu.shared:
        block //= 2
    tiles = layout.outputs // OUTPUTS * triton.cdiv(rows, block)
    split = next((n for n in (1, 2, 4) if tiles * n >= _PROGRAMS * gpu.processors), 4)
    split = min(split, layout.steps)
    narrow = split == 4 and block == 8 and layout.bits != 3
    deep = layout.bits == 4 and layout.steps // split >= 8 and tiles * split < 3 * gpu.processors
    if deep and block <= 16 and not narrow:
        stages = 5
    joined = _joins(layout, dtype, block, gpu)
    half = _half(layout, dtype, block, gpu) and not (joined and block == 16 and split == 1)
    if (half and block == 16 and not joined) or (block == 32 and gpu.hopper and (half or layout.bits == 4)):
        stages = 4
    while stages > 1 and _shared(layout, dtype, OUTPUTS, block, stages, gpu) > gpu.shared:
        stages -= 1
    options = {
        "BN": OUTPUTS // 2 if narrow else OUTPUTS,
        "BM": block,
        "SPLIT": split,
        "STAGES": stages,
        "warps": 2
        if block <= 16 and not joined and (layout.bits != 3 or layout.group == 128)
        else 4,  # two would spill
        "EARLY": int(gpu.hopper and (split == 1 or block == 64)),  # with parts, a next product takes room of the last
    }
    return options | ({"HALF": 1} if half else {}) | ({"JOINED": 2} if joined else {})


def _joins(layout: Layout, dtype: torch.dtype, block: int, gpu: Gpu) -> bool:
    """Two planes of 3 bits at a time, where warps wait for products together."""
    return gpu.hopper and layout.bits == 3 and layout.group > 32 and block >= 16 and dtype != torch.float32


def _fills(layout: Layout, outputs: int, gpu: Gpu) -> bool:
    """True if tiles of so many outputs keep most processors at work to the end."""
    tiles = layout.outputs // outputs
    return tiles >= 0.8 * gpu.processors * triton.cdiv(tiles, gpu.processors)


def wide(rows: int) -> dict[str, int]:
    """Options of `many_rows` for up to 64 rows: programs have equal parts of tiles of 256 outputs."""
    block = min(64, max(8, triton.next_power_of_2(rows)))
    stages, ahead = {8: (4, 4), 16: (4, 4), 32: (3, 3), 64: (3, 3)}[block]
    return {"BN": 128, "BM": block, "STAGES": stages, "JOINED": 4, "AHEAD": ahead, "SPLIT": 64, "EARLY": 1}


def warps(rows: int, gpu: Gpu) -> dict[str, int]:
    """Options of `by_warps`."""
    return {"BN": 16, "BM": 8 if rows <= 8 else 16, "WAYS": 4, "STAGES": 3, "EARLY": int(gpu.hopper)}


def _half(layout: Layout, dtype: torch.dtype, block: int, gpu: Gpu) -> bool:
    """Halves of a step at a time: for 64 rows, whose x would fill the shared memory, and for 3 bits, which take as many
    registers; on Hopper a whole step of 8 rows is faster."""
    few_registers = layout.bits == 3 and (block in (16, 32) or not gpu.hopper)
    return layout.halves and dtype != torch.float32 and (block == 64 or few_registers)


def _shared(layout: Layout, dtype: torch.dtype, BN: int, BM: int, STAGES: int, gpu: Gpu) -> int:
    """Bytes of shared memory that so many steps' words and rows of x, or halves of them, take in `few_rows`."""
    if _half(layout, dtype, BM, gpu):
        return STAGES * layout.step // 2 * (BN * 4 // 8 + BM * dtype.itemsize) + 4096
    return STAGES * layout.step * (BN * layout.bits // 8 + BM * dtype.itemsize) + 4096
