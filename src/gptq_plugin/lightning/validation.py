"""Measures the user's validation metrics outside Lightning's loops: `validate`, and a trial of it: `check_metrics`.

At the end of `fit` a nested `trainer.validate` would tear the strategy down a second time, and `self.log` has no loop
to report to. So `validate` runs `validation_step` over the validation dataloaders by itself and collects what it logs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import digest
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.errors import CalibrationError
from gptq_plugin.lightning.logging_to import logging_to
from gptq_plugin.training.paired import Measured
from gptq_plugin.training.quality_gate import QualityGate

log = logging.getLogger(__name__)

_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "min": torch.min,
    "max": torch.max,
    "sum": torch.sum,
}


def check_metrics(trainer: pl.Trainer, pl_module: pl.LightningModule, gate: QualityGate) -> None:
    """Refuses limits of metrics that the validation does not log, or not as their confidence needs it.

    A trial tells. Every rank calls it.

    It takes a batch of each dataloader, and only if a name is missing then, all of them; it is made twice for limits
    with a confidence, which needs the same batches each time. Where the module's
    validation cannot run before training, that is logged, and its first validation in training is checked instead.

    Raises:
        ValueError: A metric is not logged; the message names the nearest that is. Or its change cannot be known with
            the confidence that is asked for.
    """
    if not gate.limits:
        return
    try:
        with distributed.ending_together():
            most: int | None = 1
            logged = validate(trainer, pl_module, most)
            if not gate.limits.keys() <= logged.keys():
                most = None
                logged = validate(trainer, pl_module)
            again = validate(trainer, pl_module, most) if gate.confident else logged
            batches = _batches(trainer)
    except Exception as error:  # noqa: BLE001  the user's code
        log.warning(
            "the metrics of max_degradation are not checked before training, because validation_step cannot run yet "
            "(%s: %s): they are checked in the first validation",
            type(error).__name__,
            error,
        )
        return
    gate.check_names(logged)
    gate.check_parts(logged, again, batches)


def validate(trainer: pl.Trainer, pl_module: pl.LightningModule, most_batches: int | None = None) -> dict[str, float]:
    """Runs `validation_step` over the validation dataloaders, as `trainer.validate` would.

    Runs the LightningModule's hooks around epochs and batches, but not those of callbacks. Respects
    `limit_val_batches`. In a process group every rank validates its share, and all return the same values.

    Args:
        trainer: Its dataloaders are used.
        pl_module: Has the `validation_step`.
        most_batches: Batches of each dataloader at most; None takes all.

    Returns:
        Epoch values logged with `self.log` or `self.log_dict`, under Lightning's names; those that are also logged on
        each step appear a second time, with the suffix ``_epoch``. Means of what is logged in batches are `Measured`.
    """
    logged = _Logged()
    loaders = validation_loaders(trainer)
    with evaluating(pl_module), torch.no_grad(), logging_to(pl_module, logged.log, logged.log_dict):
        pl_module.on_validation_epoch_start()
        for number, loader in enumerate(loaders):
            several = len(loaders) > 1
            index = (number,) if several else ()
            for batch_idx, batch in enumerate(islice(islice(loader, _limit(trainer, loader)), most_batches)):
                batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=number)
                key = digest(batch)
                batch = trainer.precision_plugin.convert_input(
                    trainer.strategy.batch_to_device(batch, dataloader_idx=number)
                )
                logged.set_batch(batch, f"/dataloader_idx_{number}" if several else "", key)
                pl_module.on_validation_batch_start(batch, batch_idx, *index)
                with trainer.precision_plugin.val_step_context():
                    outputs = pl_module.validation_step(batch, batch_idx, *index)
                pl_module.on_validation_batch_end(outputs, batch, batch_idx, *index)
        logged.set_batch(None, "", None)
        pl_module.on_validation_epoch_end()
    return logged.values()


@dataclass(frozen=True)
class _Value:
    """What one rank logged under one name.

    Attributes:
        value: Reduced over the rank's calls.
        values, weights, keys: Of its calls, for a mean.
    """

    value: float
    values: list[float] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    keys: list[int | None] = field(default_factory=list)


@dataclass
class _Entry:
    """Values logged under one name.

    Attributes:
        reduce: Lightning's `reduce_fx`.
        names: Names under which the reduced value is returned.
        values: One per call.
        weights: Samples in each call's batch.
        keys: The digest of each call's batch; None outside of batches.
        metric: The torchmetrics object, if one was logged; it accumulates by itself.
    """

    reduce: str | Callable[[Tensor], Tensor]
    names: list[str]
    values: list[Tensor] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    keys: list[int | None] = field(default_factory=list)
    metric: Metric | None = None

    def reduce_here(self) -> _Value:
        """This rank's value."""
        if self.metric is not None:
            value = float(self.metric.compute())  # over all ranks
            self.metric.reset()
            return _Value(value)
        values = torch.stack(self.values).double()
        if self._averages:
            return _Value(math.nan, values.tolist(), self.weights, self.keys)
        return _Value(float(self._function(values)))

    def reduce_over_ranks(self, parts: list[_Value]) -> float:
        """The value over all ranks, from each one's. Their shares may differ in size."""
        if self.metric is not None:
            return parts[0].value
        if self._averages:
            values = [value for part in parts for value in part.values]
            weights = [weight for part in parts for weight in part.weights]
            keys = [key for part in parts for key in part.keys]
            mean = Measured.mean(values, weights, [key for key in keys if key is not None])
            return float(mean) if None in keys else mean
        return float(self._function(torch.tensor([part.value for part in parts], dtype=torch.float64, device="cpu")))

    @property
    def _averages(self) -> bool:
        return self.reduce in ("mean", torch.mean)

    @property
    def _function(self) -> Callable[[Tensor], Tensor]:
        return _REDUCE[self.reduce] if isinstance(self.reduce, str) else self.reduce


class _Logged:
    """Stands for a LightningModule's `log` and `log_dict`, and collects their values."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._batch: Any = None
        self._suffix = ""
        self._key: int | None = None

    def set_batch(self, batch: Any, suffix: str, key: int | None) -> None:
        """Values logged from now on belong to this batch, which has this digest; their names get the suffix."""
        self._batch, self._suffix, self._key = batch, suffix, key

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        *_: Any,
        batch_size: int | None = None,
        add_dataloader_idx: bool = True,
        rank_zero_only: bool = False,
        **__: Any,
    ) -> None:
        """`LightningModule.log`, with those of its arguments that affect the value of the epoch."""
        if on_epoch is False or (rank_zero_only and distributed.rank() != 0):
            return
        suffix = self._suffix if add_dataloader_idx else ""
        names = [name + suffix] + ([f"{name}_epoch{suffix}"] if on_step else [])
        entry = self._entries.setdefault(names[0], _Entry(reduce_fx, names))
        if isinstance(value, Metric):
            entry.metric = value
            return
        entry.values.append(torch.as_tensor(value, device="cpu").detach().float().mean())
        if batch_size is None:
            batch_size = 1 if self._batch is None else extract_batch_size(self._batch)
        entry.weights.append(batch_size)
        entry.keys.append(self._key)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def values(self) -> dict[str, float]:
        """The values that rank 0 logged, each reduced over the ranks that logged it. The same on every rank."""
        ranks = distributed.gather_objects({name: entry.reduce_here() for name, entry in self._entries.items()})
        values: dict[str, float] = {}
        for name, entry in self._entries.items():
            value = entry.reduce_over_ranks([parts[name] for parts in ranks if name in parts])
            values |= dict.fromkeys(entry.names, value)
        return dict(distributed.object_from_first(values))


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """The validation dataloaders of `fit`; none if validation is off or there is no `validation_step`."""
    if not trainer.enable_validation:
        return []
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # does nothing after the first validation
    loaders: list[Any] = tree_leaves(trainer.val_dataloaders)
    return [loader for loader in loaders if loader is not None]


def loaders_to_calibrate(trainer: pl.Trainer) -> list[Any]:
    """The validation dataloaders; raises CalibrationError if there are none."""
    loaders = validation_loaders(trainer)
    if not loaders:
        raise CalibrationError(
            "calibration='val' takes its samples from the validation dataloader, and the trainer has none: give it "
            "one (with a validation_step, and limit_val_batches above 0), or GPTQCallback(calibration=LOADER)"
        )
    return loaders


def _batches(trainer: pl.Trainer) -> float:
    """Number of batches in a validation, over all ranks; infinite if a dataloader does not know its length."""
    counts = []
    for loader in validation_loaders(trainer):
        limit = _limit(trainer, loader)
        sizes = [size for size in (sized_len(loader), limit) if size is not None]
        counts.append(min(sizes, default=math.inf))
    return sum(counts) * trainer.world_size


def _limit(trainer: pl.Trainer, loader: Any) -> int | None:
    """Number of batches to run of a dataloader; None runs all."""
    limit = trainer.limit_val_batches
    if isinstance(limit, int):
        return limit
    return None if limit in (None, 1.0) else int(len(loader) * limit)
