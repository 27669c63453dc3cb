"""Puts batches of samples of one kind together, so that fewer forwards run, or divides them: `joined`, `divided`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import rows_of
from gptq_plugin.calibration.collect import Batch, Calibration

_SAMPLES = 2**16 - 1  # of a forward: a CUDA grid has no more blocks in its second and third dimension


def joined(calibration: Calibration, sizes: Sequence[int], most: int, most_samples: int | None = None) -> Calibration:
    """The same samples in the same order, of which those of neighbouring batches run together. On one rank alone.

    Only samples that were given one by one, or chosen of a dataset and stacked, and whose tensors have the same names,
    shapes and dtypes, so that none is padded. Batches that users give, or their collators make, stay.

    Args:
        calibration: As collected.
        sizes: Of each batch, such as its tokens.
        most: The largest size of several together.
        most_samples: Their largest number, 65535 at most.
    """
    given, groups, largest = calibration.batches, list[list[int]](), min(most_samples or _SAMPLES, _SAMPLES)
    size = samples = 0
    for number, batch in enumerate(given):
        size, samples = size + sizes[number], samples + batch.samples
        if not groups or size > most or samples > largest or not _alike(given[groups[-1][0]], batch):
            groups.append([])
            size, samples = sizes[number], batch.samples
        groups[-1].append(number)
    place = {number: at for at, own in enumerate(groups) for number in own}
    return replace(
        calibration,
        batches=[given[own[0]] if len(own) == 1 else _one([given[number] for number in own]) for own in groups],
        numbers=list(range(len(groups))),
        of_all_ranks=len(groups),
        first_batches=[place[number] for number in calibration.first_batches],
    )


def divided(calibration: Calibration, most: int, *, alone: bool = False, for_good: bool = False) -> Calibration:
    """The same samples in the same order, no more than so many of those that were given one by one in a batch.
    Collective.

    Args:
        calibration: As collected.
        most: The largest number.
        alone: As for `collect`.
        for_good: They are not to run with others again.
    """
    parts = [list(_parts(batch, most, for_good)) for batch in calibration.batches]
    counts = dict(zip(calibration.numbers, map(len, parts), strict=True))
    of_all = [counts] if alone else distributed.gather_objects(counts)
    of_number = {number: count for of_rank in of_all for number, count in of_rank.items()}
    places, total = dict[int, int](), 0
    for number in sorted(of_number):
        places[number], total = total, total + of_number[number]
    starts = list(accumulate(map(len, parts), initial=0))
    return replace(
        calibration,
        batches=list(chain(*parts)),
        numbers=[places[number] + one for number in calibration.numbers for one in range(counts[number])],
        of_all_ranks=total,
        first_batches=[starts[number] for number in calibration.first_batches],
    )


def _parts(batch: Batch, most: int, for_good: bool) -> Iterator[Batch]:
    if batch.given_apart and batch.samples > most:
        for start in range(0, batch.samples, most):
            rows = slice(start, min(start + most, batch.samples))
            part = replace(batch, data=rows_of(batch.data, rows), samples=rows.stop - start)
            yield replace(part, given_apart=not for_good)
    else:
        yield replace(batch, given_apart=batch.given_apart and not for_good)


def _alike(first: Batch, second: Batch) -> bool:
    """True if the samples of both may run in one forward."""
    if not (first.given_apart and second.given_apart):
        return False
    (parts, kind), (others, other_kind) = tree_flatten(first.data), tree_flatten(second.data)
    if kind != other_kind or not all(_is_divided(part, first) for part in parts):
        return False
    return all(
        _is_divided(two, second) and (one.dtype, one.device, one.shape[1:]) == (two.dtype, two.device, two.shape[1:])
        for one, two in zip(parts, others, strict=True)
    )


def _is_divided(part: object, batch: Batch) -> bool:
    """True for a plain tensor whose first dimension is the batch's samples."""
    return type(part) is Tensor and part.layout is torch.strided and part.shape[:1] == (batch.samples,)


def _one(batches: Sequence[Batch]) -> Batch:
    leaves, kinds = zip(*(tree_flatten(batch.data) for batch in batches), strict=True)
    data = tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], kinds[0])
    return Batch(data, sum(batch.samples for batch in batches), given_apart=True, is_chosen=True)
