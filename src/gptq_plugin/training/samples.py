"""A metric of each sample of a batch, run on its own: what a paired bootstrap draws are then sequences, not batches.

A batch is divided as it stands, padding included. Whether its metric is a mean over samples, and what each weighs in
it, is judged by value: the samples' must give the batch's.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import digest, leaves, row_of, sample_count, to_device
from gptq_plugin.calibration.sequences import IGNORED_LABEL

MOST = 256  # samples of all ranks that are run on their own: enough to know a deviation to 5 %
_LEAST = 32  # of each rank, however long they take
_SECONDS = 30.0  # that they may take, however short the validation is
_TOLERANCE = 1e-3  # between a batch's value and that of its samples: they are other kernels' products
_LOGGED = ""  # the name of weights that are logged with the samples' values

_FILLER = -1  # the number of a sample that runs only because another rank has one more

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A value in a metric that is a mean over an epoch: of a batch, or of a sample that runs on its own.

    Attributes:
        value: A scalar; a tensor where it is not yet read from its device.
        weight: Of the value in the mean.
        number: Of its batch; None outside of batches.
        key: The digest of its batch; None outside of batches, and of single samples.
        precision: Of the value's dtype.
    """

    value: float | Tensor
    weight: float
    number: int | None
    key: int | None = None
    precision: float = 0.0


@dataclass(frozen=True)
class Divided:
    """A batch of which each sample was run on its own.

    Attributes:
        value: The metric of the batch.
        weight: Of the batch in the metric of all.
        values: The metric of each sample.
        counts: By name, what the samples may weigh in the batch: positions of labels or masks, or all the same.
        keys: The samples' digests.
        place: What the batch is known by among those of all ranks.
        precision: Of the values' dtype.
    """

    value: float
    weight: float
    values: list[float]
    counts: Mapping[str, list[float]]
    keys: list[int]
    place: tuple[int, int] = (0, 0)
    precision: float = 0.0

    def mean(self, name: str) -> float:
        """The samples' weighted mean; NaN if the batch has no such counts, or none at all."""
        counts = self.counts.get(name, [])
        pairs = [(count, value) for count, value in zip(counts, self.values, strict=False) if count]
        total = math.fsum(count for count, _ in pairs)
        return math.fsum(count * value for count, value in pairs) / total if total else math.nan

    def fits(self, name: str) -> bool:
        """True if these weights give the batch's value."""
        largest = max(map(abs, (self.value, *(value for value in self.values if math.isfinite(value)))))
        return abs(self.mean(name) - self.value) <= (_TOLERANCE + self.precision) * largest

    def parts(self, name: str) -> Iterable[tuple[float, float, int]]:
        """Yields value, weight in the metric of all, and key of every sample that counts."""
        total = math.fsum(self.counts[name])
        for value, count, key in zip(self.values, self.counts[name], self.keys, strict=True):
            if count:
                yield value, self.weight * count / total, key


@dataclass(frozen=True)
class Samples:
    """Of a metric that is a mean over batches, what it is of samples.

    Attributes:
        batches: Some, evenly spaced.
        total: Number of samples in all batches.
        why: Why they could not be run on their own; empty if they could.
    """

    batches: list[Divided] = field(default_factory=list)
    total: int = 0
    why: str = ""

    @classmethod
    def over_ranks(cls, parts: Iterable[Samples]) -> Samples:
        parts = list(parts)
        why = next((part.why for part in parts if part.why), "")
        return cls([one for part in parts for one in part.batches], sum(part.total for part in parts), why)

    def names(self) -> list[str]:
        """Weights that give the value of every batch, those that were logged first."""
        return [name for name in self._all_names if all(one.fits(name) for one in self.batches)]

    def unfit(self) -> str:
        """Why none do, by the first batch that fits none."""
        for one in self.batches:
            if not any(one.fits(name) for name in self._all_names):
                means = " or ".join(dict.fromkeys(f"{one.mean(name):.4g}" for name in self._all_names))
                return f"a batch's value, {one.value:.4g}, is no mean of its samples' ({means or 'none'})"
        return "no weights of samples give the values of all batches"

    @property
    def _all_names(self) -> list[str]:
        return list(dict.fromkeys(name for one in self.batches for name in one.counts))


def samples_of(batch: Any) -> list[Any]:
    """The samples of a batch, each a batch of one.

    Raises:
        ValueError: It is none that can be divided: it has no tensors, or they lie in objects of unknown kind.
    """
    count, sizes = _count(batch), _sizes(batch)
    if not count:
        raise ValueError(f"a batch ({type(batch).__name__}) has no tensors whose first dimension is its samples")
    rows = [row_of(batch, row) for row in range(count)]
    if _sizes(rows[0]) != [1 if size == count else size for size in sizes]:
        raise ValueError(f"a batch ({type(batch).__name__}) is no structure of dictionaries, lists and tensors")
    return rows


def counts_in(batch: Any, logged: Sequence[float]) -> dict[str, list[float]]:
    """What the samples of a batch may weigh in its value.

    Args:
        batch: As the step gets it.
        logged: The weights that each sample's value was logged with.
    """
    counts = {_LOGGED: list(map(float, logged))}
    for name, value in leaves(batch):
        if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != len(logged):
            continue
        if not (value.is_floating_point() or value.is_complex()):
            kept = value != 0 if "mask" in name or value.dtype == torch.bool else value != IGNORED_LABEL
            name = name or "the batch"  # a tensor alone
            for shown, part in ((f"{name} but the first", kept[:, 1:]), (name, kept)):
                counts[shown] = part.sum(1).tolist()
    return counts


class Chosen(Generic[T]):
    """Some batches of a validation, evenly spaced, with few enough samples to run them on their own.

    Batches whose samples are many give one batch at least. The validation that they come from begins now. Ranks whose
    dataloaders differ in length know a batch by its dataloader and its place in that.

    Attributes:
        sizes: Samples of each batch that came; 0 for one that has no tensors.
        kept: The batches kept so far, on the CPU, by their number; after `run`, those that ran.
        are_ones: After `run`, true if all batches are single samples already, on all ranks.
        why: Why samples did not run; empty if they did, or need not.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.kept: dict[int, tuple[T, Any]] = {}
        self.are_ones = False
        self.why = "none were run"
        self._most = MOST // distributed.world_size()
        self._stride = 1
        self._came: Counter[int] = Counter()  # of each dataloader
        self._numbers: dict[tuple[int, int], int] = {}  # by dataloader and place in it
        self._first: dict[int, tuple[T, Any]] = {}  # batch of each dataloader
        self._keys: dict[int, list[int]] = {}  # the digests of the samples of the batches that ran
        self._began = time.perf_counter()

    def add(self, place: T, batch: Any, loader: int = 0) -> None:
        """Takes the next batch. What is kept are containers of its own: a step may take keys out of the batch.

        Args:
            place: For the step.
            batch: It.
            loader: The number of its dataloader.
        """
        number, where = len(self.sizes), (loader, self._came[loader])
        self._came[loader] += 1
        self.sizes.append(_count(batch))
        self._numbers[where] = number
        if sum(where) % self._stride and loader in self._first:
            return
        own = place, to_device(batch, torch.device("cpu"))
        self._first.setdefault(loader, own)
        if sum(where) % self._stride == 0:
            self.kept[number] = own
        while sum(self.sizes[n] for n in self.kept) > self._most and len(self.kept) > 1:
            self._stride *= 2
            chosen = {self._numbers[where] for where in self._numbers if sum(where) % self._stride == 0}
            self.kept = {n: one for n, one in self.kept.items() if n in chosen}

    def run(
        self, step: Callable[[int, T, Any], None], around: contextlib.AbstractContextManager[Any] | None = None
    ) -> None:
        """Runs a step on every sample of the kept batches, or finds why that cannot be, the same on every rank.

        It takes no longer than the validation did, or half a minute, but for the first samples. Every rank runs as many
        samples of each dataloader at the same time, since a step may wait for the others': one whose batch has fewer,
        or that has no such batch, repeats some under another number.

        Args:
            step: Called with a batch's number, its place, and a sample, which it may change.
            around: Entered for them, if there are any to run.
        """
        own = {where: self.sizes[number] for where, number in self._numbers.items()}
        of_ranks = distributed.gather_objects((own, self._stride))
        self.are_ones = all(size == 1 for sizes, _ in of_ranks for size in sizes.values())
        loaders = [{loader for loader, _ in sizes} for sizes, _ in of_ranks]
        self.why = "" if all(one and one == loaders[0] for one in loaders) else "a rank has no batches of a dataloader"
        if self.are_ones or self.why:
            return
        stride = max(stride for _, stride in of_ranks)
        steps: dict[tuple[int, int], int] = {}
        for sizes, _ in of_ranks:
            for where, size in sizes.items():
                if sum(where) % stride == 0:
                    steps[where] = max(size, steps.get(where, 0))
        ends = time.perf_counter() + max(_SECONDS, time.perf_counter() - self._began)
        try:
            with distributed.failing_together():  # before any step, which may wait for the others'
                for where in steps:
                    samples_of(self._at(where)[1])
            with distributed.failing_together(), around or contextlib.nullcontext():
                self.kept = dict(self._running(steps, ends, step))
        except Exception as error:  # noqa: BLE001  the user's code
            self.why = f"single samples cannot be run ({type(error).__name__}: {_first_line(error)})"

    def _at(self, where: tuple[int, int]) -> tuple[T, Any]:
        """A batch; on a rank without it, the first one of its dataloader."""
        return self.kept[self._numbers[where]] if where in self._numbers else self._first[where[0]]

    def _running(
        self, steps: Mapping[tuple[int, int], int], ends: float, step: Callable[[int, T, Any], None]
    ) -> Iterator[tuple[int, tuple[T, Any]]]:
        """Yields the batches that ran, until the first rank's time is over.

        Args:
            steps: The samples to run for each batch: those of the rank that has most.
            ends: When.
            step: As for `run`.
        """
        ran = 0
        for where in sorted(steps, key=lambda where: (f"{sum(where):064b}"[::-1], where)):  # halves are even too
            if distributed.object_from_first(ran >= _LEAST and time.perf_counter() > ends):
                return
            place, batch = self._at(where)
            samples, number = samples_of(batch), self._numbers.get(where)
            own = [] if number is None else samples
            if number is not None:
                self._keys[number] = list(map(digest, samples))
                for sample in own:
                    step(number, place, sample)
            for _ in range(steps[where] - len(own)):
                step(_FILLER, place, samples_of(batch)[0])
            ran += steps[where]
            if number is not None:
                yield number, (place, batch)

    def samples(self, parts: Sequence[Part], single: Iterable[Part]) -> Samples | None:
        """What is known of the samples of a mean; None if the batches are single samples already.

        Args:
            parts: What it is the mean over.
            single: The same of the samples that ran on their own.
        """
        if self.are_ones:
            return None
        if self.why:
            return Samples(why=self.why)
        found: dict[int | None, list[Part]] = {}
        for one in single:
            found.setdefault(one.number, []).append(one)
        numbers = [part.number for part in parts]
        divided = []
        for part in parts:
            if part.number is None or part.number not in self.kept:
                continue
            samples = found.get(part.number, [])
            if len(samples) != self.sizes[part.number] or numbers.count(part.number) > 1:
                return Samples(why="there is not one value for each sample")
            divided.append(self._divided(part, part.number, samples))
        return Samples(divided, sum(self.sizes[number] for number in numbers if number is not None))

    def _divided(self, part: Part, number: int, samples: Sequence[Part]) -> Divided:
        """A batch with its samples' values."""
        counts = counts_in(self.kept[number][1], [one.weight for one in samples])
        values = [float(one.value) for one in samples]
        place = distributed.rank(), number
        return Divided(float(part.value), part.weight, values, counts, self._keys[number], place, part.precision)


def _count(batch: Any) -> int:
    """The number of samples; 0 if no tensor has one for each."""
    count = sample_count(batch)
    return count if count in _sizes(batch) else 0


def _sizes(batch: Any) -> list[int]:
    return [value.shape[0] if value.dim() else 0 for _, value in leaves(batch) if isinstance(value, Tensor)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
