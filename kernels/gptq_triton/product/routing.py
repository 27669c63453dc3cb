"""What surrounds products of rows sorted by expert: `sort_pairs` or `sort_many` before them, `combine` after them.

For few tokens each takes one launch in place of several: a model that generates waits for the host. For many, `combine`
reads the rows once, where PyTorch's operations write and read them three times.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..needs_triton import tl, triton

MOST_PAIRS = 256  # of a token and an expert: each is compared with each
_BLOCK = 512  # channels of a program of `combine`


class Sorted(NamedTuple):
    """Pairs of a token and an expert, sorted by expert.

    Attributes:
        ends: Where the experts' pairs end, int32 [experts]; behind the last are those of no expert.
        tokens: Of the sorted pairs, integers [pairs].
        places: Of the pairs among the sorted ones, integers [pairs].
    """

    ends: Tensor
    tokens: Tensor
    places: Tensor


@triton.jit
def _sort_kernel(
    chosen, ends, tokens, places, pairs, experts, each,
    PAIRS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, PAIRS)
    mine = tl.load(chosen + i, mask=i < pairs, other=2**31 - 1).to(tl.int32)  # those that are none come last
    e = tl.arange(0, EXPERTS)
    tl.store(ends + e, tl.sum((mine[None, :] <= e[:, None]).to(tl.int32), 1), mask=e < experts)
    j = tl.arange(0, PAIRS)
    other = tl.load(chosen + j, mask=j < pairs, other=2**31 - 1).to(tl.int32)
    before = (other[None, :] < mine[:, None]) | ((other[None, :] == mine[:, None]) & (j[None, :] < i[:, None]))
    place = tl.sum(before.to(tl.int32), 1)
    tl.store(places + i, place, mask=i < pairs)
    tl.store(tokens + place, i // each, mask=i < pairs)


@triton.jit
def _combine_kernel(
    y, places, weights, out, width, each,
    ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(each):
        pair = token * each + k
        row = tl.load(places + pair).to(tl.int64)
        weight = tl.load(weights + pair).to(tl.float32)
        value = tl.load(y + row * width + column, mask=there, other=0).to(tl.float32) * weight
        if ROUNDED:
            value = value.to(y.dtype.element_ty).to(tl.float32)
        total += value
    tl.store(out + token.to(tl.int64) * width + column, total.to(out.dtype.element_ty), mask=there)


def sort_pairs(chosen: Tensor, experts: int) -> Sorted:
    """Sorts the pairs of each token and the experts chosen for it, in their order within an expert.

    Args:
        chosen: Integers [tokens, experts of one], contiguous; `experts` or more stand for none.
        experts: Their number.

    Raises:
        ValueError: More pairs than `MOST_PAIRS`, or another shape.
    """
    pairs = chosen.numel()
    if chosen.dim() != 2 or not chosen.is_contiguous() or not 0 < pairs <= MOST_PAIRS:
        raise ValueError(f"chosen must be contiguous [tokens, experts of one], at most {MOST_PAIRS}: {chosen.shape}")
    whole = torch.empty(experts + 2 * pairs, dtype=torch.int32, device=chosen.device)
    found = Sorted(*whole.split([experts, pairs, pairs]))
    with _on(chosen):
        _sort_kernel[(1,)](
            chosen, *found, pairs, experts, chosen.shape[1],
            PAIRS=max(16, triton.next_power_of_2(pairs)), EXPERTS=max(16, triton.next_power_of_2(experts)),
            num_warps=8,
        )  # fmt: skip
    return found


def sort_many(chosen: Tensor, experts: int) -> Sorted:
    """`sort_pairs` for any number of pairs, in PyTorch's operations.

    Args:
        chosen: Integers [tokens, experts of one]; `experts` or more stand for none.
        experts: Their number.
    """
    ids = chosen.flatten()
    ids = ids.to(torch.int16) if experts < 2**15 else ids  # fewer bits to sort by
    ids, order = ids.sort(stable=True)
    numbers = torch.arange(experts, dtype=ids.dtype, device=ids.device)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=ids.device)
    return Sorted(torch.searchsorted(ids, numbers, right=True, out_int32=True), order // chosen.shape[1], places)


def combine(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sum of each token's rows by its weights, in y's dtype.

    Products are rounded to y's dtype if weights have it too, and added in float32: as PyTorch does it in two steps.

    Args:
        y: [pairs, width], sorted, contiguous.
        places: As in `Sorted`.
        weights: [tokens, experts of one], contiguous.
    """
    tokens, each = weights.shape
    if not y.is_contiguous() or not weights.is_contiguous() or not y.shape[0] == places.numel() == weights.numel():
        raise ValueError(f"y {list(y.shape)} and weights {list(weights.shape)} must be contiguous, and of all pairs")
    out = y.new_empty(tokens, y.shape[1])
    with _on(y):
        _combine_kernel[(tokens, triton.cdiv(y.shape[1], _BLOCK))](
            y, places, weights, out, y.shape[1], each, ROUNDED=weights.dtype == y.dtype, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
