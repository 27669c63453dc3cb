"""Measures the user's validation metrics outside Lightning's loops: `validate`, and a trial of it: `check_metrics`.

At the end of `fit` a nested `trainer.validate` would tear the strategy down a second time, and `self.log` has no loop
to report to. So `validate` runs `validation_step` over the validation dataloaders by itself and collects what it logs.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES, CombinedLoader

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import digest
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.errors import CalibrationError
from gptq_plugin.lightning.logged import Logged, Place
from gptq_plugin.lightning.logging_to import logging_to
from gptq_plugin.training.quality_gate import QualityGate
from gptq_plugin.training.samples import Chosen

log = logging.getLogger(__name__)


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
            by_sample = bool(gate.confident)
            logged = validate(trainer, pl_module, most, by_sample=by_sample)
            if not gate.limits.keys() <= logged.keys():
                most = None
                logged = validate(trainer, pl_module, by_sample=by_sample)
            again = validate(trainer, pl_module, most, by_sample=by_sample) if gate.confident else logged
            batches = _batches_of_ranks(trainer)
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


def validate(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    most_batches: int | None = None,
    *,
    by_sample: bool = True,
) -> dict[str, float]:
    """Runs `validation_step` over the validation dataloaders, as `trainer.validate` would.

    Runs the LightningModule's hooks around epochs and batches, but not those of callbacks. Respects
    `limit_val_batches`. In a process group every rank validates its share, and all return the same values.

    Args:
        trainer: Its dataloaders are used.
        pl_module: Has the `validation_step`.
        most_batches: Batches of each dataloader at most; None takes all.
        by_sample: Runs an epoch of single samples behind it, those of some batches (`Chosen`). Nothing that is logged
            there changes a metric: it tells what a mean is of samples.

    Returns:
        Epoch values logged with `self.log` or `self.log_dict`, under Lightning's names; those that are also logged on
        each step appear a second time, with the suffix ``_epoch``. Means of what is logged in batches are `Measured`.
    """
    logged, chosen = Logged(), Chosen[Place]()
    with evaluating(pl_module), torch.no_grad(), logging_to(pl_module, logged.log, logged.log_dict):
        pl_module.on_validation_epoch_start()
        for place, batch in _batches(trainer, most_batches):
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=place.loader)
            key = digest(batch)
            logged.number = len(chosen.sizes)
            chosen.add(place, batch, place.loader)
            _step(trainer, pl_module, batch, place, logged, key)
        logged.set_batch(None, "", None)
        pl_module.on_validation_epoch_end()
    logged.close()
    single = Logged()
    if by_sample:
        _run_samples(trainer, pl_module, chosen, single)
    return logged.values(chosen, single)


def _step(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, place: Place, logged: Logged, key: int | None
) -> None:
    index = (place.loader,) if place.is_one_of_several else ()
    batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch, dataloader_idx=place.loader))
    logged.set_batch(batch, f"/dataloader_idx_{place.loader}" if place.is_one_of_several else "", key)
    pl_module.on_validation_batch_start(batch, place.batch, *index)
    with trainer.precision_plugin.val_step_context():
        outputs = pl_module.validation_step(batch, place.batch, *index)
    pl_module.on_validation_batch_end(outputs, batch, place.batch, *index)


def _run_samples(trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Chosen[Place], logged: Logged) -> None:
    """Runs an epoch of single samples, if that can be."""

    def step(number: int, place: Place, sample: Any) -> None:
        logged.number = number
        _step(trainer, pl_module, sample, place, logged, None)

    with evaluating(pl_module), torch.no_grad(), logging_to(pl_module, logged.log, logged.log_dict):
        chosen.run(step, _epoch(pl_module, logged))


@contextlib.contextmanager
def _epoch(pl_module: pl.LightningModule, logged: Logged) -> Iterator[None]:
    """The hooks around an epoch of single samples. They end it after an error too: steps may have gathered some."""
    pl_module.on_validation_epoch_start()
    try:
        yield
    except Exception:
        logged.set_batch(None, "", None)
        with contextlib.suppress(Exception):
            pl_module.on_validation_epoch_end()
        raise
    logged.set_batch(None, "", None)
    pl_module.on_validation_epoch_end()


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """The validation dataloaders of `fit`; none if validation is off or there is no `validation_step`."""
    if not trainer.enable_validation:
        return []
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # does nothing after the first validation
    return list(_combined(trainer).flattened)


def loaders_to_calibrate(trainer: pl.Trainer) -> list[Any]:
    """The validation dataloaders; raises CalibrationError if there are none."""
    loaders = validation_loaders(trainer)
    if not loaders:
        raise CalibrationError(
            "calibration='val' takes its samples from the validation dataloader, and the trainer has none: give it "
            "one (with a validation_step, and limit_val_batches above 0), or GPTQCallback(calibration=LOADER)"
        )
    return loaders


def _batches(trainer: pl.Trainer, most: int | None) -> Iterator[tuple[Place, Any]]:
    """Yields the batches of a validation, at most so many of each dataloader, as Lightning's loop takes them: one
    dataloader's after the other's, or put together by a `CombinedLoader`."""
    counts = _counts(trainer, most)
    if not counts:
        return
    given = _combined(trainer)
    combined = CombinedLoader(given.iterables, given._mode)  # Lightning's keeps its limits and iterator
    combined.limits = counts
    several = given._mode == "sequential" and len(counts) > 1
    total = _total(trainer, counts)
    for batch, number, loader in islice(combined, None if math.isinf(total) else int(total)):
        yield Place(number, loader, several), batch


def _batches_of_ranks(trainer: pl.Trainer) -> float:
    """Number of batches in a validation, over all ranks; infinite if a dataloader does not know its length."""
    return _total(trainer, _counts(trainer)) * trainer.world_size


def _total(trainer: pl.Trainer, counts: Sequence[float]) -> float:
    """Number of batches in a validation with so many of each dataloader."""
    return float(_SUPPORTED_MODES[_combined(trainer)._mode]["fn"](counts))  # type: ignore[arg-type]


def _counts(trainer: pl.Trainer, most: int | None = None) -> list[float]:
    """Number of batches to take of each dataloader; infinite of one that does not know its length."""
    counts = []
    for loader in validation_loaders(trainer):
        sizes = [size for size in (sized_len(loader), _limit(trainer, loader), most) if size is not None]
        counts.append(min(sizes, default=math.inf))
    return counts


def _combined(trainer: pl.Trainer) -> CombinedLoader:
    """The validation dataloaders as Lightning holds them, where validation is enabled."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    assert combined is not None
    return combined


def _limit(trainer: pl.Trainer, loader: Any) -> int | None:
    """Number of batches to run of a dataloader; None runs all."""
    limit = trainer.limit_val_batches
    if isinstance(limit, int):
        return limit
    return None if limit in (None, 1.0) else int(len(loader) * limit)
