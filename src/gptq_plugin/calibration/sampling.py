"""Divides samples of dataloaders or given data among the ranks, each sample once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Source
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError

TRAIN = "the train dataloader"
VALIDATION = "the validation dataloader"


def require_single(loader: Any) -> Any:
    """Returns the train dataloader.

    Raises:
        CalibrationError: There is none, or several, which training reads together.
    """
    if loader is None or isinstance(loader, (Mapping, list, tuple)):
        raise CalibrationError(
            f"calibration takes its samples from {TRAIN}, and there is none, or more than one: give the callback "
            "calibration=..., the texts or batches to use"
        )
    return loader


def sample_loaders(
    loaders: Sequence[Any],
    config: QuantizeConfig,
    name: str,
    *,
    nsamples: int,
    first: int = 0,
    is_general: bool = False,
) -> list[Source]:
    """This rank's share of `nsamples` samples of dataloaders, batched by their collators, one source per dataloader.

    Map-style datasets are sampled anew: `config.seed` chooses among the samples that their samplers may draw, and the
    choice is dealt to the ranks. It does not depend on their number, and a distributed sampler's padding repeats no
    sample. Anything else (an iterable dataset, a combination of loaders) is read from its start on every rank,
    and must yield that rank's share.

    Args:
        loaders: One, or several that form one population, such as those of validation.
        config: batch_size and seed are read.
        name: The dataloaders' name.
        nsamples: Number of samples over all ranks.
        first: Number of samples that earlier sources dealt to the ranks.
        is_general: See `Source`.
    """
    if not all(isinstance(loader, DataLoader) and not _is_stream(loader) for loader in loaders):
        share, k = _share_of(nsamples, first), len(loaders)
        shares = [share * (number + 1) // k - share * number // k for number in range(k)]
        # A DataLoader can be restarted, so its first batch may be tried before training.
        return [
            Source(loader, name, share, is_general, is_stream=not isinstance(loader, DataLoader))
            for loader, share in zip(loaders, shares, strict=True)
        ]
    size = distributed.world_size()
    # A user's random sampler may draw differently on every rank: all use rank 0's choice.
    choice, population = distributed.object_from_first(_choose(loaders, config.seed, nsamples))
    mine = choice[(distributed.rank() - first) % size :: size]
    name = f"{name}'s {population} (seed {config.seed})"
    sources = []
    for number, loader in enumerate(loaders):
        indices = [index for which, index in mine if which == number]
        sources.append(Source(_subset(loader, indices, config), name, len(indices), is_general))
    return sources


def deal(data: Iterable[Any], name: str, *, nsamples: int, first: int = 0, is_general: bool = False) -> Source:
    """This rank's share of data that is the same on every rank, dealt in turn: `nsamples` samples over all ranks."""
    size = distributed.world_size()
    mine = islice(data, (distributed.rank() - first) % size, None, size)
    return Source(mine, name, _share_of(nsamples, first), is_general)


def _share_of(nsamples: int, first: int) -> int:
    """Number of samples among first, first + 1, ..., first + nsamples - 1 that are this rank's if dealt in turn."""
    return len(range((distributed.rank() - first) % distributed.world_size(), nsamples, distributed.world_size()))


def _is_stream(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)


def _subset(loader: DataLoader[Any], indices: list[int], config: QuantizeConfig) -> DataLoader[Any]:
    # No workers, which would take longer to start than to use; a separate generator leaves the global one unchanged.
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=None if loader.batch_size is None and loader.batch_sampler is None else config.batch_size,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _choose(loaders: Sequence[DataLoader[Any]], seed: int, nsamples: int) -> tuple[list[tuple[int, int]], int]:
    """Chooses samples, as (loader, index), and returns the size of the population too."""
    population = [(number, index) for number, loader in enumerate(loaders) for index in _population(loader)]
    order = torch.randperm(len(population), generator=torch.Generator().manual_seed(seed))
    return [population[i] for i in order[:nsamples].tolist()], len(population)


def _population(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices of the samples that the loader may draw, each once: a custom sampler may leave some out."""
    sampler = getattr(loader.batch_sampler, "sampler", None) or loader.sampler
    everything = range(len(loader.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, DistributedSampler):
        if sampler.dataset is loader.dataset:
            return everything
        # Lightning wraps a user's sampler as a "dataset" of the indices it draws.
        drawn: Iterable[int] = (sampler.dataset[i] for i in range(len(sampler.dataset)))  # type: ignore[arg-type]
    elif sampler is None or isinstance(sampler, (RandomSampler, SequentialSampler)):
        return everything
    else:
        drawn = islice(sampler, len(everything))
    return sorted(set(drawn))
