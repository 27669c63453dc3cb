"""The samples of a finish, divided into those to train on and those held out: `Rows`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Batch, Calibration, collect
from gptq_plugin.calibration.sampling import share_of
from gptq_plugin.calibration.sources import Sources
from gptq_plugin.calibration.takes import Takes
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError

_LEAST = 2  # batches: one to train on, and one to judge on
_LARGEST_SHARE = 4  # of fewer samples than were asked, at most a quarter is held out


@dataclass
class Rows:
    """This rank's batches.

    Attributes:
        train: To train on; token samples are in an order drawn at random, so that those of a batch, and of a step, are
            not neighbours in their file.
        held_out: To judge on; the last of every source.
        numbers: Of the held-out batches, unique over all ranks.
        samples: To train on, over all ranks.
        deviations: A sentence for each difference from the request, of all ranks.
        sources: Number of samples by the name of their source, over all ranks.
        digest: Of all samples, over all ranks: 64 hexadecimal digits.
    """

    train: list[Batch] = field(default_factory=list)
    held_out: list[Batch] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    samples: int = 0
    deviations: list[str] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    digest: str = ""

    @property
    def batches(self) -> list[Batch]:
        """All, those to train on first."""
        return self.train + self.held_out


def rows_of(
    data: Iterable[Any],
    config: QuantizeConfig,
    held_out: int,
    tokenizer: Any = None,
    takes: Takes | None = None,
    seed: int = 0,
) -> Rows:
    """Collects samples as calibration does, and divides them. In a process group every rank calls it.

    Args:
        data: As for `collect`.
        config: Its `nsamples` are those to train on and those held out.
        held_out: Samples to hold out, of several sources in their proportion; of fewer than asked a quarter at most.
        tokenizer, takes: As for `collect`.
        seed: Of the order of samples to train on.

    Raises:
        CalibrationError: As `collect`; or there are fewer than two batches.
    """
    parts = [Sources((part,)) for part in data.parts] if isinstance(data, Sources) else [data]
    there = _surely_there(data)
    share = share_of(config.nsamples)
    given = []
    for part, known in zip(parts, there, strict=True):
        order = _Order(held_out, config.collected_batch_size, sum(there) - known, seed)
        given.append(collect(part, config, tokenizer, share, takes=takes, order=order))
    sizes = [_sizes(collected) for collected in given]
    totals = [sum(of_source.values()) for of_source in sizes]
    total = sum(totals)
    rows, digest, count = Rows(), 0, 0
    if total < config.nsamples:
        held_out = min(held_out, max(1, total // _LARGEST_SHARE))
        rows.deviations.append(f"{total} samples given, {config.nsamples} asked: {held_out} of them are to be held out")
    for collected, of_source, size in zip(given, sizes, totals, strict=True):
        _divide(rows, collected, of_source, max(1, round(held_out * size / max(1, total))), count)
        count += collected.of_all_ranks
        digest += collected.digest
    everyones = distributed.gather_objects(
        (digest, rows.sources, rows.deviations, bool(rows.train), bool(rows.numbers))
    )
    sources: dict[str, int] = {}
    for _, of_rank, _, _, _ in everyones:
        for name, samples in of_rank.items():
            sources[name] = sources.get(name, 0) + samples
    rows.sources = sources
    rows.deviations = list(dict.fromkeys(one for _, _, told, _, _ in everyones for one in told))
    rows.digest = f"{sum(one for one, *_ in everyones) % 2**256:064x}"
    if not (any(trains for *_, trains, _ in everyones) and any(judges for *_, judges in everyones)):
        raise _too_few(f"{total} samples", config)
    return rows


@dataclass(frozen=True)
class _Order:
    """Draws the order of a source's samples, but for the last ones: those that may be held out stay there.

    These are put into batches a few at a time: of samples of different lengths the last batches would be those of rare
    lengths, wherever they were.

    Attributes:
        held_out: Samples to hold out, of all sources.
        batch_size: Of these.
        others: Samples that other sources surely have, so that as large a share is held out of them.
        seed: Of the order.
    """

    held_out: int
    batch_size: int
    others: int
    seed: int

    def __call__(self, count: int) -> list[Sequence[int]]:
        own = math.ceil(self.held_out * count / max(1, count + self.others))
        first, size = max(0, count - own), self.batch_size
        drawn = torch.randperm(first, generator=torch.Generator("cpu").manual_seed(self.seed), device="cpu")
        return [drawn.tolist(), *(range(start, min(start + size, count)) for start in range(first, count, size))]


def _surely_there(data: Iterable[Any]) -> list[int]:
    """Samples that each source surely has, over all ranks. Collective."""
    if not isinstance(data, Sources):
        return [0]
    of_ranks = distributed.gather_objects([part.at_least for part in data.parts])
    of_parts = zip(data.parts, zip(*of_ranks, strict=True), strict=True)
    return [own[0] if part.is_shared else sum(own) for part, own in of_parts]


def check_batches(data: Iterable[Any], config: QuantizeConfig) -> None:
    """Refuses data of which it is sure, without reading it, that it has too few batches. Every rank calls it.

    Raises:
        CalibrationError: There are fewer than two.
    """
    count = data.batches() if isinstance(data, Sources) else None
    if count is not None and count < _LEAST:
        raise _too_few("too few samples", config)


def _too_few(found: str, config: QuantizeConfig) -> CalibrationError:
    return CalibrationError(
        f"a finish trains on some batches and judges on others, and there are {found} in batches of "
        f"{config.collected_batch_size}: give more samples, or a smaller batch_size of the finish"
    )


def _sizes(collected: Calibration) -> dict[int, int]:
    """Number of samples of each batch of a source, by its number over all ranks, in their order. Collective."""
    own = [(number, batch.samples) for number, batch in zip(collected.numbers, collected.batches, strict=True)]
    return dict(sorted(one for of_rank in distributed.gather_objects(own) for one in of_rank))


def _divide(rows: Rows, collected: Calibration, sizes: Mapping[int, int], wanted: int, offset: int) -> None:
    """Adds a source's batches: the last ones, as many as hold so many samples, are held out."""
    chosen: dict[int, int] = {}
    held = 0
    for number in reversed(sizes):
        if held >= wanted or len(chosen) + 1 == len(sizes):
            break
        chosen[number] = sizes[number]
        held += sizes[number]
    for number, batch in zip(collected.numbers, collected.batches, strict=True):
        if number in chosen:
            rows.held_out.append(batch)
            rows.numbers.append(offset + number)
        else:
            rows.train.append(batch)
    rows.samples += sum(sizes.values()) - held
    rows.deviations += collected.deviations
    for name, samples in collected.sources.items():
        rows.sources[name] = rows.sources.get(name, 0) + samples
