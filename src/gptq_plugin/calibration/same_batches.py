"""The same batches whatever the number of ranks: what every rank took of the data, joined in turn.

A forward's last bits depend on which rows run together. So token samples of all ranks are numbered in turn (the first
of every rank, then the second of every rank) and only then put into batches, which are dealt to the ranks. Ready
batches stay where they are, numbered likewise. The number of samples is limited over all ranks, in this order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, zip_longest
from typing import Any

from gptq_plugin import distributed


@dataclass(frozen=True)
class Taken:
    """What was taken of some data, by one rank or by all.

    Attributes:
        samples: Samples that are to be put into batches.
        sizes: Number of samples in each ready batch.
        limit: Number of samples asked for.
        dropped: Number of empty samples.
        read: Number of items read.
        given: Number of items there are; None if unknown.
        stopped: True if the data holds more than was asked for.
        notes: Number of samples by what was done to them, to follow "12 calibration samples".
    """

    samples: Sequence[Any]
    sizes: Sequence[int]
    limit: int
    dropped: int
    read: int
    given: int | None
    stopped: bool
    notes: Mapping[str, int] = field(default_factory=dict)

    def deviations(self) -> list[str]:
        """A sentence for each difference from the request; `stopped` has none where data is endless."""
        count, found = sum(self.sizes) + len(self.samples), []
        if count > self.limit:
            found.append(f"{count} calibration samples used: nsamples={self.limit} falls inside a batch")
        if self.dropped:
            found.append(f"{self.dropped} empty calibration samples dropped")
        return [*found, *(f"{samples} calibration samples {note}" for note, samples in self.notes.items())]

    def unused(self) -> str:
        """A sentence for the items that were given and not used."""
        number = "more samples" if self.given is None else f"{self.given - self.read} of {self.given}"
        return f"calibration stops at nsamples={self.limit}: {number} given were not used"


def mine(number_of_batches: int) -> range:
    """Numbers of the batches that are dealt to this rank, of batches that all ranks have."""
    return range(distributed.rank(), number_of_batches, distributed.world_size())


def over_ranks(own: Taken) -> tuple[Taken, Sequence[int]]:
    """What all ranks took, and the numbers of this rank's ready batches that are used, from its first one. Collective.

    If any rank holds ready batches, each token sample of another is one too: a loader's last batch may hold a single
    sample.
    """
    everyones = distributed.gather_objects(own)
    given = [one.given for one in everyones]
    joined = Taken(
        samples=[sample for _, sample in _in_turn(one.samples for one in everyones)],
        sizes=(),
        limit=sum(one.limit for one in everyones),
        dropped=sum(one.dropped for one in everyones),
        read=sum(one.read for one in everyones),
        given=None if None in given else sum(number for number in given if number is not None),
        stopped=any(one.stopped for one in everyones),
        notes=sum((Counter(one.notes) for one in everyones), Counter()),
    )
    if not any(one.sizes for one in everyones):
        return joined, []
    held = _in_turn(one.sizes or [1] * len(one.samples) for one in everyones)
    before = accumulate((size for _, size in held), initial=0)
    used = [pair for pair, count in zip(held, before, strict=False) if count < joined.limit]
    left = len(held) - len(used)  # a rank's limit is a part of the whole, and may fall inside a batch
    numbers = [number for number, (rank, _) in enumerate(used) if rank == distributed.rank()]
    sizes, stopped = [size for _, size in used], joined.stopped or left > 0
    return replace(joined, samples=(), sizes=sizes, read=joined.read - left, stopped=stopped), numbers


def _in_turn(of_ranks: Iterable[Sequence[Any]]) -> list[tuple[int, Any]]:
    """(rank, item) of the first item of every rank, then of every rank's second, and so on."""
    numbered = [[(rank, item) for item in items] for rank, items in enumerate(of_ranks)]
    return [pair for pair in chain.from_iterable(zip_longest(*numbered)) if pair is not None]
