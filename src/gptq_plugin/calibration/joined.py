"""Puts batches of samples of one kind together, so that fewer forwards run: `joined`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from gptq_plugin.calibration.collect import Batch, Calibration

_SAMPLES = 2**16 - 1  # of a forward: a CUDA grid has no more blocks in its second and third dimension


def joined(calibration: Calibration, sizes: Sequence[int], most: int) -> Calibration:
    """The same samples in the same order, of which those of neighbouring batches run together. On one rank alone.

    Only samples that were given one by one, or chosen of a dataset and stacked, and whose tensors have the same names,
    shapes and dtypes, so that none is padded. Batches that users give, or their collators make, stay.

    Args:
        calibration: As collected.
        sizes: Of each batch, such as its tokens.
        most: The largest size of several together, which are 65535 samples at most.
    """
    given, groups = calibration.batches, list[list[int]]()
    size = samples = 0
    for number, batch in enumerate(given):
        size, samples = size + sizes[number], samples + batch.samples
        if not groups or size > most or samples > _SAMPLES or not _alike(given[groups[-1][0]], batch):
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
    return Batch(data, sum(batch.samples for batch in batches), given_apart=True)
