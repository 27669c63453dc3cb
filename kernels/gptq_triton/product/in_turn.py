"""Launches that begin while the product before them on the stream ends: `wait`, `let_go`, `announce`, `launch`.

Hopper's programmatic dependent launch. A kernel lets the next one go, at its beginning or once its last loads are done.
That one, if it is launched so too, waits before it reads or writes until the first is over; it may have weights fetched
into the cache meanwhile. Behind any other kernel it begins as always.

Tested by tests/kernels/test_products.py: by products of products.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from triton.language.extra.cuda import gdc_launch_dependents as let_go
from triton.language.extra.cuda import gdc_wait as wait

from ..needs_triton import tl, triton

__all__ = ["announce", "fetch", "launch", "let_go", "wait"]


@triton.jit
def fetch(pointers):
    """Has what pointers point to, 32 bytes each, fetched into the L2 cache. It reads nothing, and so does no harm where
    a kernel before still writes."""
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def announce(
    words, scales, zeros, step, first, stride,
    BITS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Fetches a step's words, scales and zeros of the BN outputs from `first` on."""
    TILES: tl.constexpr = BLOCKS * (3 if BITS == 3 else 1)  # of words
    PAIRS: tl.constexpr = BLOCKS * PLANES * LANES // GROUP // 2
    size = stride.to(tl.int64) * LANES
    sectors = first * LANES + tl.arange(0, BN * LANES // 16) * 16
    for tile in tl.static_range(TILES):
        fetch(words + size * (step * TILES + tile) + sectors)
    for i in tl.static_range(PAIRS):
        pairs = (step * PAIRS + i) * stride + first + tl.arange(0, BN // 8) * 8
        fetch(scales + pairs)
        if not SYMMETRIC:
            fetch(zeros + pairs)


def launch(early: int) -> dict[str, bool]:
    """Options of a kernel's launch."""
    return {"launch_pdl": True} if early else {}
