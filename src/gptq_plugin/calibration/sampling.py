"""Divides samples of dataloaders or given data among the ranks, each sample once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import leaves
from gptq_plugin.calibration.dataset_name import dataset_name
from gptq_plugin.calibration.same_batches import mine
from gptq_plugin.calibration.sources import Source
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.surroundings import same_random_numbers
from gptq_plugin.errors import CalibrationError, some

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
    is_general: bool = False,
) -> list[Source]:
    """This rank's share of `nsamples` samples of dataloaders, batched by their collators, one source per dataloader.

    Map-style datasets are sampled anew: `config.seed` chooses among the samples that their samplers may draw, and the
    choice is put into batches, which are dealt to the ranks. The batches do not depend on the number of ranks, and a
    distributed sampler's padding repeats no sample. Anything else (an iterable dataset, a combination of loaders) is
    read from its start on every rank, and must yield that rank's share.

    Args:
        loaders: One, or several that form one population, such as those of validation.
        config: batch_size and seed are read.
        name: The dataloaders' name.
        nsamples: Number of samples over all ranks.
        is_general: See `Source`.
    """
    if not all(isinstance(loader, DataLoader) and not _is_stream(loader) for loader in loaders):
        share, k = share_of(nsamples), len(loaders)
        shares = [share * (number + 1) // k - share * number // k for number in range(k)]
        # A DataLoader can be restarted, so its first batch may be tried before training.
        return [
            Source(loader, f"{name}{_datasets([loader])}", share, is_general, is_stream=_goes_on(loader))
            for loader, share in zip(loaders, shares, strict=True)
        ]
    # A user's random sampler may draw differently on every rank: all use rank 0's choice.
    choice, population = distributed.object_from_first(_choose(loaders, config.seed, nsamples))
    name = f"{name}'s {population}{_datasets(loaders)} (seed {config.seed})"
    sources = []
    for number, loader in enumerate(loaders):
        indices = [index for which, index in choice if which == number]
        is_chosen, is_single = not _yields_batches(loader), _collates_one(loader, indices)
        size = config.collected_batch_size if is_chosen and not is_single else 1
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        own = [batches[one] for one in mine(len(batches))]
        is_stacked = is_chosen and loader.collate_fn is default_collate
        data, samples = _of_batches(loader, own, config.seed), sum(map(len, own))
        source = Source(data, name, samples, is_general, is_chosen=is_chosen, is_single=is_single)
        sources.append(replace(source, is_stacked=is_stacked))
    return sources


def deal(data: Iterable[Any], name: str, *, nsamples: int, is_general: bool = False) -> Source:
    """Data that is the same on every rank; each uses its share of the batches of `nsamples` samples."""
    return Source(data, name, nsamples, is_general, is_shared=True)


def share_of(nsamples: int) -> int:
    """This rank's share of `nsamples` samples; the shares of all ranks add up to it."""
    return len(range(distributed.rank(), nsamples, distributed.world_size()))


def _datasets(loaders: Sequence[Any]) -> str:
    """The names of the loaders' datasets, to follow their number of samples; empty without any."""
    names = dict.fromkeys(dataset_name(getattr(loader, "dataset", None)) for loader in loaders)
    known = [name for name in names if name]
    return f" of {some(known)}" if known else ""


def _is_stream(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)


def _goes_on(loader: Any) -> bool:
    """True if what is read of a loader may be missing in training: it is none of PyTorch's, or its stream is an
    iterator, which begins nowhere else than where it was left."""
    if not isinstance(loader, DataLoader):
        return True
    return _is_stream(loader) and iter(loader.dataset) is iter(loader.dataset)


def _yields_batches(loader: DataLoader[Any]) -> bool:
    return loader.batch_size is None and loader.batch_sampler is None


def _collates_one(loader: DataLoader[Any], indices: Sequence[int]) -> bool:
    """True for a dataloader of single samples whose collator does not stack two: it gives the first, or a list.

    Its step is for batches of one sample, too. What cannot be tried is found where it is used.
    """
    if loader.batch_size != 1 or loader.collate_fn is default_collate or not indices:
        return False
    try:
        with same_random_numbers():
            sample = loader.dataset[indices[0]]
            one, two = (loader.collate_fn([copy.deepcopy(sample) for _ in range(count)]) for count in (1, 2))
    except Exception:  # noqa: BLE001 (a user's code may raise any)
        return False
    (leaves, kind), (others, other_kind) = _tensors_in(one), _tensors_in(two)
    grows = any(2 * first.numel() == second.numel() > 0 for first, second in zip(leaves, others, strict=False))
    return kind != other_kind or not grows


def _tensors_in(batch: Any) -> tuple[list[Tensor], list[str]]:
    """The tensors of a batch, and their names."""
    named = [(name, value) for name, value in leaves(batch) if isinstance(value, Tensor)]
    return [value for _, value in named], [name for name, _ in named]


def _of_batches(loader: DataLoader[Any], batches: list[list[int]], seed: int) -> DataLoader[Any]:
    """A dataloader of these batches of the loader's samples, by index, put together by its collator."""
    chosen: dict[str, Any] = {"batch_sampler": batches}
    if _yields_batches(loader):
        chosen = {"batch_size": None, "sampler": [index for batch in batches for index in batch]}
    # No workers, which would take longer to start than to use; a separate generator leaves the global one unchanged.
    generator = torch.Generator("cpu").manual_seed(seed)
    return DataLoader(loader.dataset, collate_fn=loader.collate_fn, generator=generator, **chosen)


def _choose(loaders: Sequence[DataLoader[Any]], seed: int, nsamples: int) -> tuple[list[tuple[int, int]], int]:
    """Chooses samples, as (loader, index), and returns the size of the population too."""
    population = [(number, index) for number, loader in enumerate(loaders) for index in _population(loader)]
    order = torch.randperm(len(population), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
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
