"""The Trainer's dataloaders, as calibration samples them: undivided, and those of its last evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from gptq_plugin import distributed
from gptq_plugin.errors import CalibrationError


def undivided(loader: Any) -> Any:
    """Returns the DataLoader that accelerate wrapped, before its samples were split over ranks; else `loader` itself.

    A stream stays divided: its shards are this rank's, and if rank 0 reads for all, batches are dealt in turn.
    """
    base = getattr(loader, "base_dataloader", loader)
    if base is loader:
        return loader
    from accelerate.data_loader import DataLoaderDispatcher  # installed, since it made the loader

    if isinstance(base.dataset, IterableDataset):
        # Without its dispatcher every rank would read all of such a stream.
        dispatched = isinstance(loader, DataLoaderDispatcher)
        return DataLoader(_Dealt(base), batch_size=None, collate_fn=_unchanged) if dispatched else base
    inner = getattr(base.batch_sampler, "batch_sampler", None)
    return base if inner is None else DataLoader(base.dataset, batch_sampler=inner, collate_fn=base.collate_fn)


def refuse_without_evaluation(args: TrainingArguments) -> None:
    """Raises CalibrationError if a training evaluates nothing, which ``calibration="val"`` would take samples from."""
    if args.eval_strategy == "no" and not args.eval_on_start:
        raise CalibrationError(
            "calibration='val' takes its samples from what the trainer evaluates in training, and it does not: "
            "give it an eval_strategy, or trainer.add_callback(GPTQTrainerCallback(..., "
            "calibration=trainer.get_eval_dataloader()))"
        )


class Evaluations:
    """Dataloaders of a Trainer's last evaluation: one per dataset, and new ones for every evaluation.

    Attributes:
        loaders: Those of the last step with an evaluation.
    """

    def __init__(self) -> None:
        self.loaders: list[Any] = []
        self._first: int | None = None
        self._last: int | None = None

    def add(self, step: int, loader: Any) -> bool:
        """Adds a dataloader; returns whether it belongs to the first evaluation, so that its data is new."""
        if step != self._last:
            self.loaders = []
        self.loaders.append(loader)
        self._first, self._last = step if self._first is None else self._first, step
        return step == self._first


class _Dealt(IterableDataset[Any]):
    """Batches, of which each rank gets one in turn."""

    def __init__(self, batches: DataLoader[Any]):
        self.batches = batches
        self.dataset = batches.dataset  # for its name in the report

    def __iter__(self) -> Iterator[Any]:
        return islice(self.batches, distributed.rank(), None, distributed.world_size())


def _unchanged(batch: Any) -> Any:
    return batch
