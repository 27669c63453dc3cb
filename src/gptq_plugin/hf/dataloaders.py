"""Accelerate's dataloaders as they were before it divided their batches among the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from gptq_plugin import distributed


def undivided(loader: Any) -> Any:
    """The dataloader under accelerate's, whose samples are dealt to no rank yet; anything else as it is.

    A stream stays divided: its shards are this rank's, and where rank 0 reads for all, batches are dealt in turn.
    """
    base = getattr(loader, "base_dataloader", loader)
    if base is loader:
        return loader
    from accelerate.data_loader import DataLoaderDispatcher  # an extra, which made the loader

    if isinstance(base.dataset, IterableDataset):
        # Without its dispatcher every rank would read such a stream whole.
        dispatched = isinstance(loader, DataLoaderDispatcher)
        return DataLoader(_Dealt(base), batch_size=None, collate_fn=_unchanged) if dispatched else base
    inner = getattr(base.batch_sampler, "batch_sampler", None)
    return base if inner is None else DataLoader(base.dataset, batch_sampler=inner, collate_fn=base.collate_fn)


class _Dealt(IterableDataset[Any]):
    """Batches, of which each rank gets one in turn."""

    def __init__(self, batches: DataLoader[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return islice(self.batches, distributed.rank(), None, distributed.world_size())


def _unchanged(batch: Any) -> Any:
    return batch
