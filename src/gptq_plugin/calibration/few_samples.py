"""A part of a batch that shows its padding: a few samples, of texts also only the positions around its edge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptq_plugin.calibration.batches import leaves, map_tensors, rows_of
from gptq_plugin.calibration.collect import Batch
from gptq_plugin.calibration.sequences import IGNORED_LABEL, arguments_of, masks_among

T = TypeVar("T")

_REACH = 64  # positions kept on either side of an edge


def paddings(batch: Batch) -> int:
    """Number of masks in a batch that hide something, labels behind which nothing follows among them."""
    return sum(not bool((mask == mask.flatten()[0]).all()) for mask in _edges(arguments_of(batch.data)).values())


def few_samples(batch: Batch, *, targets: bool) -> Any:
    """A part of a batch's data, or None if that cannot be divided into samples.

    Two samples for each mask: that which hides most and that which hides least. If there are only ids and masks, both
    [samples, positions], also only positions around an edge of the mask.

    Args:
        batch: The batch.
        targets: Labels and `decoder_...` are a sequence of their own.
    """
    named = arguments_of(batch.data)
    tensors = [value for _, value in leaves(batch.data) if isinstance(value, Tensor)]
    if not tensors or any(value.dim() == 0 or value.shape[0] != batch.samples for value in tensors):
        return None
    edges = _edges(named)
    chosen = _samples(list(edges.values()), batch.samples)
    if any(value.dim() != 2 or value.is_floating_point() for value in tensors):
        return map_tensors(batch.data, lambda value: value[chosen.to(value.device)])
    group = {id(value): targets and (name == "labels" or name.startswith("decoder_")) for name, value in named.items()}
    windows: dict[bool, slice] = {}
    for name, mask in edges.items():
        windows.setdefault(group[id(named[name])], _around_edge(mask[chosen.to(mask.device)]))
    lengths: dict[bool, set[int]] = {}
    for value in tensors:
        lengths.setdefault(group.get(id(value), False), set()).add(value.shape[1])
    alike = all(len(of_group) == 1 for of_group in lengths.values())

    def part(value: Tensor) -> Tensor:
        window = windows.get(group.get(id(value), False), slice(2 * _REACH))
        return value[chosen.to(value.device)][:, window] if alike else value[chosen.to(value.device)]

    return map_tensors(batch.data, part)


def first_samples(batch: Batch, tokens: int) -> Batch:
    """The first samples of a batch, about as many as have so many tokens, padding too; all where tokens are not known.

    The number of samples is that of all tensors that begin with it; a forward may not take the part all the same.
    """
    known = batch.positions
    count = batch.samples if not known else -(-tokens * batch.samples // known)
    return batch if count >= batch.samples else replace(batch, data=rows_of(batch.data, slice(count)), samples=count)


def of_few(whole: Batch, tokens: int, run: Callable[[Batch], T]) -> tuple[T, float]:
    """Runs the `first_samples` of a batch, or all of it where the forward does not take those.

    Returns:
        What `run` returned, and how many times the samples that ran the batch has.
    """
    few = first_samples(whole, tokens)
    if few is not whole:
        with contextlib.suppress(Exception):  # a forward may need whole batches; what else it raises comes again
            return run(few), whole.samples / few.samples
    return run(whole), 1.0


def _edges(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks, and labels as a mask, [samples, ...] each."""
    edges = {name: mask for name, mask in masks_among(arguments).items() if mask.dim() > 1}
    labels = arguments.get("labels")
    if labels is not None and labels.dim() == 2 and labels.numel() and not labels.is_floating_point():
        edges["labels"] = labels != IGNORED_LABEL
    return edges


def _samples(edges: list[Tensor], samples: int) -> Tensor:
    """Numbers of the samples; twice the same if there is only one, for comparison."""
    chosen: list[int] = []
    for mask in edges:
        if mask.shape[0] == samples:
            sums = (mask != 0).flatten(1).sum(1)
            chosen += [int(sums.argmin()), int(sums.argmax())]
    chosen = list(dict.fromkeys(chosen)) or [0]
    others = (number for number in range(samples) if number not in chosen)
    return torch.tensor(chosen if len(chosen) > 1 else [*chosen, next(others, chosen[0])], device="cpu")


def _around_edge(mask: Tensor) -> slice:
    """The positions around the first that differs from the one before it in some sample."""
    if mask.dim() != 2 or mask.shape[1] < 2:
        return slice(None)
    differs = (mask[:, 1:] != mask[:, :-1]).any(0)
    edge = int(differs.int().argmax()) + 1 if bool(differs.any()) else _REACH
    return slice(max(0, edge - _REACH), edge + _REACH)
