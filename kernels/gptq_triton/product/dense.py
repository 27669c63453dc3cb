"""A weight in the kernels' layout as a plain matrix: `dense`.

Tested by tests/kernels/test_products.py: by its results.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005  (Triton has no unpacking)
from __future__ import annotations

import torch
from torch import Tensor

from ..needs_triton import tl, triton
from .codes import centered, half_of, of_pair, scale_of, word_of
from .layout import Arranged, Layout

_OUTPUTS = 16  # of a program


@triton.jit
def _dense_kernel(
    words, scales, zeros, out, N, K, stride,
    BITS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = GROUP // LANES  # planes that share a scale
    PAIRS: tl.constexpr = BLOCKS * PLANES // EACH // 2
    TILES: tl.constexpr = 3 if BITS == 3 else 1  # of words, in a block
    step = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    lane = tl.arange(0, LANES)
    at = n[:, None] * LANES + lane[None, :]
    size = stride.to(tl.int64) * LANES  # words of a block
    kind = tl.zeros([1], tl.float16)  # which holds every code less its zero
    row = out + n.to(tl.int64)[:, None] * K
    for index in tl.static_range(BLOCKS * PLANES):
        if index % PLANES == 0:
            w = ()
            for i in tl.static_range(TILES):
                tile = words + size * ((step * BLOCKS + index // PLANES) * TILES + i) + at
                w = w + (tl.load(tile, eviction_policy="evict_first"),)
        if index % (2 * EACH) == 0:
            pair = (step * PAIRS + index // (2 * EACH)) * stride + n
            s = tl.load(scales + pair)
            z = s
            if not SYMMETRIC:
                z = tl.load(zeros + pair)
        zero = 2 ** (BITS - 1)
        if not SYMMETRIC:
            zero = of_pair(z, index // EACH % 2)[:, None]
        own = w[word_of(index % PLANES, BITS)]
        q = centered(own, w[half_of(index % PLANES, BITS)], zero, kind, index % PLANES, BITS, False, SYMMETRIC)
        value = q.to(tl.float32) * scale_of(s, index // EACH % 2)[:, None]
        k = (step * (BLOCKS * PLANES) + index) * LANES + lane
        tl.store(row + k[None, :], value.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def dense(layout: Layout, arranged: Arranged, dtype: torch.dtype) -> Tensor:
    """Returns the weight, [out, in] in `dtype`, contiguous, every number rounded once; channels are in its order."""
    out = torch.empty(layout.n_out, layout.n_in, dtype=dtype, device=arranged.words.device)
    _dense_kernel[(triton.cdiv(layout.n_out, _OUTPUTS), layout.steps)](
        arranged.words, arranged.scales, arranged.zeros, out,
        layout.n_out, layout.n_in, arranged.stride,
        BITS=layout.bits, LANES=layout.lanes, PLANES=layout.planes, BLOCKS=layout.blocks_a_step, GROUP=layout.group,
        SYMMETRIC=layout.symmetric, BN=_OUTPUTS, num_warps=4,
    )  # fmt: skip
    return out
