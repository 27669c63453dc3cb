"""A step of the channels of x Wᵀ, plane by plane: `add_step`, which the kernels for few rows share.

Tested by tests/kernels/test_products.py: by their results.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005  (Triton has no unpacking)
from __future__ import annotations

from ..needs_triton import tl, triton
from .codes import centered, half_of, moved, of_pair, scale_of, word_of


@triton.jit
def add_step(
    acc, row, words, scales, zeros, step, half, steps, at, outputs, there, lane, K, stride,
    BITS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr, JOINED: tl.constexpr = 1,
):  # fmt: skip
    """Returns acc + W xᵀ of a step of the channels: a tile of words is loaded as it lies, expanded plane by plane and
    multiplied with the plane's channels of x; a group's sum is scaled in float32.

    Args:
        acc: float32 [BN, BM], or [WAYS, BN, BM] for as many steps at once.
        row: Pointers to the first channels of rows of x, [.., BM, JOINED * LANES].
        words, scales, zeros: The weight's.
        step: Which one, or which ones, [WAYS, 1].
        half: Which half of it or of them, with HALF; else 0.
        steps: Of the weight; read for several at once, of which some may be past the end.
        at: Where the outputs' words are in a tile of words of all outputs, [.., BN, LANES].
        outputs: Which they are, [.., BN].
        there: Whether there are such rows, [.., BM, 1].
        lane: [.., 1, JOINED * LANES].
        K: Channels of x.
        stride: Outputs of a tile of words.
        BITS, LANES, PLANES, BLOCKS, GROUP, SYMMETRIC: The layout's.
        WHOLE: The channels fill all steps.
        HALF: Only half of a step, or of each.
        JOINED: Planes of a group that are multiplied at a time, 1 or 2; of 2 for one step at a time.
    """
    SEVERAL: tl.constexpr = len(acc.shape) == 3
    BF16: tl.constexpr = row.dtype.element_ty == tl.bfloat16
    EACH: tl.constexpr = GROUP // LANES  # planes that share a scale
    PAIRS: tl.constexpr = BLOCKS * PLANES // EACH // 2
    TURN: tl.constexpr = BLOCKS * PLANES // (1 + HALF)  # planes that are multiplied here
    TILES: tl.constexpr = 3 if BITS == 3 else 1  # of words, in a block
    size = stride.to(tl.int64) * LANES
    kind = tl.zeros([1], row.dtype.element_ty)
    of_words = tl.expand_dims(step, 2) if SEVERAL else step
    if SEVERAL:
        there &= of_words < steps
    for index in tl.static_range(TURN):
        if index % PLANES == 0:
            tile = words + size * ((of_words * BLOCKS + index // PLANES) * TILES) + at
            w = ()
            if HALF and TILES == 3:
                own = _load(tile + size * half, of_words, steps, SEVERAL, "evict_first")
                w = (own, own)
            for i in tl.static_range(len(w), TILES):
                w = w + (_load(tile + size * i, of_words, steps, SEVERAL, "evict_first"),)
            if HALF:
                w = w[: TILES - 1] + (moved(w[TILES - 1], _eight(half, scales, stride, SEVERAL)),)
        if index % (2 * EACH) == 0:
            pair = (step * PAIRS + half * (PAIRS // 2) + index // (2 * EACH)) * stride + outputs
            s = _load(scales + pair, step, steps, SEVERAL, "")
            z = s
            if not SYMMETRIC:
                z = _load(zeros + pair, step, steps, SEVERAL, "")
        if index % EACH == 0:
            total = tl.zeros_like(acc)
            zero = 2 ** (BITS - 1)
            if not SYMMETRIC:
                zero = tl.expand_dims(of_pair(z, index // EACH % 2), -1)
        codes = w[word_of(index % PLANES, BITS)]
        q = centered(codes, w[half_of(index % PLANES, BITS)], zero, kind, index % PLANES, BITS, BF16, SYMMETRIC)
        if index % JOINED < JOINED - 1:
            first = q
        else:
            if JOINED == 2:  # no thread's numbers move
                q = tl.reshape(tl.permute(tl.join(first, q), (0, 2, 1)), (q.shape[0], 2 * LANES))
            k = (of_words * (BLOCKS * PLANES) + half * TURN + index // JOINED * JOINED) * LANES
            inside = there if WHOLE else there & (k + lane < K)
            a = tl.load(row + k, mask=inside, other=0)
            transposed = tl.permute(a, (0, 2, 1)) if SEVERAL else tl.trans(a)
            total = tl.dot(q, transposed, total, input_precision="ieee")
        if index % EACH == EACH - 1:
            acc += total * tl.expand_dims(scale_of(s, index // EACH % 2), -1)
    return acc


@triton.jit
def _load(pointers, step, steps, SEVERAL: tl.constexpr, POLICY: tl.constexpr):
    if SEVERAL:
        return tl.load(pointers, mask=step < steps, other=0, eviction_policy=POLICY)
    else:
        return tl.load(pointers, eviction_policy=POLICY)


@triton.jit
def _eight(half, scales, stride, SEVERAL: tl.constexpr):
    """8 * half, [1, 1] or [1, 1, 1]. For an operand that is not loaded the compiler would lay the words out anew: hence
    a load, which reads nothing, since no stride is negative, and gives what stands for it."""
    nowhere = tl.zeros([1, 1, 1] if SEVERAL else [1, 1], tl.int32)
    return tl.load(scales + nowhere, mask=nowhere > stride, other=8 * half)
