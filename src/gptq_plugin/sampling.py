"""Calibration batches from a training dataloader: this rank's share of the samples, each of them once."""

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
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError


def calibration_batches(loader: Any, config: QuantizeConfig) -> Iterable[Any]:
    """Batches of a training dataloader's samples, put together by its own collator.

    A map-style dataset is sampled anew: `config.nsamples` of the samples its sampler may draw, chosen by
    `config.seed` and dealt to the ranks. So a distributed sampler's padding counts no sample twice, and the
    choice does not depend on the number of ranks. Anything else (an iterable dataset, a combination of
    loaders) is read from its start on each rank, which then must bring its own share.

    Args:
        loader: What `Trainer.train_dataloader` gives.
        config: nsamples, batch_size and seed are read.

    Raises:
        CalibrationError: There is no single train dataloader to take samples from.
    """
    if loader is None or isinstance(loader, (Mapping, list, tuple)):
        raise CalibrationError(
            "calibration takes its samples from the train dataloader, and there is none, or several: give "
            "GPTQCallback(calibration=...) the texts or batches to use"
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    # A user's random sampler may draw other samples on every rank: all take rank 0's choice.
    chosen = distributed.object_from_first(_choose(loader, config))
    indices = chosen[distributed.rank() :: distributed.world_size()]
    # Workers are not worth their start for so few samples; a generator of its own leaves the global one alone.
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=None if loader.batch_size is None and loader.batch_sampler is None else config.batch_size,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _choose(loader: DataLoader[Any], config: QuantizeConfig) -> list[int]:
    population = _population(loader)
    order = torch.randperm(len(population), generator=torch.Generator().manual_seed(config.seed))
    return [population[i] for i in order[: config.nsamples].tolist()]


def _population(loader: DataLoader[Any]) -> Sequence[int]:
    """The samples the loader may draw, each once: a user's own sampler may leave some out."""
    sampler = getattr(loader.batch_sampler, "sampler", None) or loader.sampler
    everything = range(len(loader.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, DistributedSampler):
        if sampler.dataset is loader.dataset:
            return everything
        # Lightning wraps a user's sampler as the "dataset" whose items are the indices it draws.
        drawn: Iterable[int] = (sampler.dataset[i] for i in range(len(sampler.dataset)))  # type: ignore[arg-type]
    elif sampler is None or isinstance(sampler, (RandomSampler, SequentialSampler)):
        return everything
    else:
        drawn = islice(sampler, len(everything))
    return sorted(set(drawn))
