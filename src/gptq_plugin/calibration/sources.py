"""Where calibration data comes from: `Source`, or several of them.

Tested by tests/calibration/test_training_data.py: with the options that make them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from gptq_plugin import distributed


@dataclass(frozen=True)
class Source:
    """Calibration data and its origin.

    Attributes:
        data: This rank's part, or the whole (see `is_shared`), as for `collect`.
        name: Its origin, to follow "12 samples of"; contains no path and no text.
        nsamples: Largest number of samples to use of it.
        is_general: Not the run's own data. In its texts and in token samples without labels, every token is its own
            label.
        is_stream: Its first batch cannot be read before the others.
        is_shared: The same data on every rank: each reads all of it and uses its share of the batches.
        is_chosen: Its samples were chosen for calibration, and so many of them put together.
        is_single: Each of these batches is one sample, whatever its tensors' sizes.
        is_stacked: These batches are nothing but their samples one below the other.
    """

    data: Iterable[Any]
    name: str
    nsamples: int
    is_general: bool = False
    is_stream: bool = False
    is_shared: bool = False
    is_chosen: bool = False
    is_single: bool = False
    is_stacked: bool = False

    @property
    def at_least(self) -> int:
        """Number of samples that it surely holds, of those that are used."""
        if isinstance(self.data, DataLoader):  # those of datasets with a length are made with `nsamples` samples
            return 0 if isinstance(self.data.dataset, IterableDataset) else self.nsamples
        return min(self.nsamples, len(self.data)) if isinstance(self.data, Sized) else 0

    @property
    def batches(self) -> int | None:
        """Number of batches on this rank, if that is sure: those of a dataset with a length were chosen by number."""
        is_chosen = isinstance(self.data, DataLoader) and not isinstance(self.data.dataset, IterableDataset)
        try:
            return len(self.data) if is_chosen else None  # type: ignore[arg-type]
        except TypeError:  # the user's sampler has no length
            return None


@dataclass(frozen=True)
class Sources:
    """Several sources, each collected separately.

    Attributes:
        parts: The same number, in the same order, on every rank.
    """

    parts: tuple[Source, ...]

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts:
            yield from part.data

    def at_least(self) -> int:
        """Number of samples that they surely hold, over all ranks. Collective."""
        shared = sum(part.at_least for part in self.parts if part.is_shared)
        own = sum(part.at_least for part in self.parts if not part.is_shared)
        return shared + sum(distributed.gather_objects(own))

    def batches(self) -> int | None:
        """Number of batches over all ranks; None if that is not sure. Collective."""
        own = [part.batches for part in self.parts]
        of_ranks = [count for of_rank in distributed.gather_objects(own) for count in of_rank]
        known = [count for count in of_ranks if count is not None]
        return sum(known) if len(known) == len(of_ranks) else None

    def first_batches(self) -> Sources:
        """The first batch of every source that is not a stream."""
        return Sources(tuple(replace(part, data=islice(part.data, 1)) for part in self.parts if not part.is_stream))


def least_samples(data: Iterable[Any]) -> int:
    """Number of samples that data surely holds, over all ranks; 0 if unknown. Collective."""
    return data.at_least() if isinstance(data, Sources) else 0
