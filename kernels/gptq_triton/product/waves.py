"""Which tiles products of more than 64 rows have on Hopper, and which rows have a launch of their own.

What a product takes is estimated as so many waves of tiles: a program has a tile at a time, and the last wave takes
as long as any, however few of its programs have one. The unit is a wave of tiles of 256 rows. The numbers were
fitted to products of 65 to 2092 rows by seven shapes of 4 bits on an H200 (`docs/benchmarks/qlinear.md`).
"""

from __future__ import annotations

from ..needs_triton import triton
from .choice import Gpu, Options
from .layout import Layout

NARROW: Options = {"BN": 64, "BM": 64, "STAGES": 4, "JOINED": 4, "AHEAD": 4, "SPLIT": 1, "EARLY": 1}  # of `many_rows`
MEDIUM: Options = {"BM": 128, "STAGES": 8, "AHEAD": 3, "WIDTH": 2, "EARLY": 1}
SHARED: Options = {"BM": 128, "STAGES": 8, "AHEAD": 3, "WIDTH": 2, "SPLIT": 2, "EARLY": 1}
LARGE: Options = {"BM": 256, "STAGES": 5, "AHEAD": 2, "WIDTH": 2}
SHARED_ROWS = 256  # up to which programs may share a tile: parts take memory
TOGETHER = 128  # rows that have one launch in any case; the first of two has a multiple
_OUTPUTS = 128  # of a tile
_WAVE = {64: 0.42, 128: 0.6, 256: 1.0}  # of tiles of so many rows
_OF_FEW_ROWS = 0.3  # its tiles have 64 rows and 64 outputs, and run several at a time
_EMPTY = 0.2  # more, in the mean, where the last tiles lack more than 64 rows: the copy engine is slow where x ends
_ADDED = 1000  # over input channels: programs that share a tile add its sums
_LAUNCH = 500  # likewise: a launch more


def tiles_for(layout: Layout, rows: int, gpu: Gpu) -> Options | None:
    """Options of `many_rows`; None where `few_rows` is faster."""
    return _fastest(layout, rows, gpu)[1]


def first_rows(layout: Layout, rows: int, gpu: Gpu) -> int:
    """How many rows the first launch has: all, or a multiple of `TOGETHER`.

    Args:
        layout: The weight's sizes.
        rows: More than `TOGETHER`.
        gpu: The kind of GPU, on which `many_rows` takes the layout.
    """
    first = (rows - 1) // TOGETHER * TOGETHER
    apart = _fastest(layout, first, gpu)[0] + _rest(layout, rows - first, gpu) + _LAUNCH / layout.n_in
    return first if apart < _fastest(layout, rows, gpu)[0] else rows


def _fastest(layout: Layout, rows: int, gpu: Gpu) -> tuple[float, Options | None]:
    """(estimate, options of `many_rows`, None for `few_rows`)."""
    across = _across(layout)
    found: list[tuple[float, Options | None]] = []
    for options in (NARROW, MEDIUM, LARGE):
        waves = triton.cdiv(across * triton.cdiv(rows, options["BM"]), gpu.processors)
        found.append((waves * _wave(options["BM"], rows), options))
    if rows <= SHARED_ROWS:
        tiles = across * triton.cdiv(rows, SHARED["BM"])
        part = tiles / min(2 * tiles, gpu.processors)
        found.append((part * _wave(SHARED["BM"], rows) + _ADDED / layout.n_in, SHARED))
        found.append((2 * across * triton.cdiv(rows, 64) / gpu.processors * _OF_FEW_ROWS, None))
    return min(found, key=lambda one: one[0])


def _wave(height: int, rows: int) -> float:
    """The estimate for a wave of tiles of so many rows."""
    down = triton.cdiv(rows, height)
    slower = _EMPTY / down if down * height - rows > 64 else 0.0
    return _WAVE[height] * (1 + slower)


def _rest(layout: Layout, rows: int, gpu: Gpu) -> float:
    """The estimate for at most 128 rows; up to 64, reading the words is what takes the time."""
    if rows > 64:
        return _fastest(layout, TOGETHER, gpu)[0]
    return _across(layout) / gpu.processors * (0.2 + 0.25 * rows / 64)


def _across(layout: Layout) -> int:
    return triton.cdiv(layout.outputs, _OUTPUTS)
