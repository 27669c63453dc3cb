"""Finds forwards that take only some of the samples we put together, whose samples then run one by one: `all_seen`.

A step that was written for batches of one sample may take `batch[0]`, and would show one sample in eight. A batch of
copies of a sample tells: each layer has as many times the rows it has of one.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import copies_of
from gptq_plugin.calibration.collect import Batch, Calibration
from gptq_plugin.calibration.forward import CallsModels, evaluating
from gptq_plugin.calibration.joined import divided
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.calibration.takes import receiver
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.experts import experts_of
from gptq_plugin.model.hf_models import is_transformers
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.walk.layer_inputs import watch_inputs

log = logging.getLogger(__name__)


def all_seen(plan: Plan, calibration: Calibration, options: PassOptions, *, alone: bool = False) -> Calibration:
    """The calibration, with a forward for each sample if one of several takes only some. Collective.

    Batches that users give are theirs. A forward that cannot be tried with one sample is left as it is, and so are the
    forwards of transformers' models.

    Args:
        plan: The layers.
        calibration: This rank's batches.
        options: How they run.
        alone: As for `collect`.

    Raises:
        CalibrationError: A collator of the user's put the samples together, or they were one tensor.
    """
    missed = next(filter(None, distributed.gather_objects(_missed(plan, calibration, options))), None)
    if missed is None:
        return calibration
    if any(distributed.gather_objects(any(map(_is_collated, calibration.batches)))):
        raise CalibrationError(
            f"{missed}, and these batches, of one tensor or from a collate_fn, are not taken apart: give batch_size=1 "
            "in the quantizer's options, or have the step take all samples of a batch"
        )
    told = f"{missed}: each sample ran in a forward of its own"
    log.info("%s", told)
    apart = divided(calibration, 1, alone=alone, for_good=True)
    return replace(apart, deviations=[*apart.deviations, told])


def _is_collated(batch: Batch) -> bool:
    return batch.is_chosen and not batch.given_apart and batch.samples > 1


def _missed(plan: Plan, calibration: Calibration, options: PassOptions) -> str | None:
    """Tells what this rank's forwards do not take, or None."""
    batches, numbers = calibration.batches, list(calibration.first_batches)
    numbers += [max(range(len(batches)), key=lambda number: batches[number].samples)] if batches else []
    numbers = [n for n in dict.fromkeys(numbers) if batches[n].is_chosen and batches[n].samples > 1]
    if not numbers or _of_transformers(plan, options):
        return None
    positions = Positions(plan.model, batches, plan.config.token_weighting)
    with evaluating(plan.model), BatchRuns(plan, calibration, positions, options) as runs:
        found = (_missed_of(plan, runs, number, batches[number]) for number in numbers)
        return next(filter(None, found), None)


def _of_transformers(plan: Plan, options: PassOptions) -> bool:
    """True if transformers' models are called with the batches' fields, of which they take all samples."""
    if options.forward is not None and not isinstance(options.forward, CallsModels):
        return False
    runners = getattr(options.forward, "modules", ()) or [plan.model]
    return all(is_transformers(receiver(runner)) for runner in runners)


def _missed_of(plan: Plan, runs: BatchRuns, number: int, batch: Batch) -> str | None:
    own = {target.name for target in plan.targets if experts_of(target.name, target.module) is None}
    layers = {target.name: target.module for target in plan.targets if target.name in own or not own}

    def run(row: int, count: int, visit: Callable[[str, Tensor], None]) -> None:
        part = Batch(copies_of(batch.data, row, count), count)
        with watch_inputs(layers, visit):
            runs.run_alone(runs.forward(number, part=part), number)

    def rows(count: int) -> Counter[str]:
        found: Counter[str] = Counter()
        run(0, count, lambda name, x: found.update({name: x.numel() // max(1, x.shape[-1])}))
        return found

    def inputs(row: int) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = defaultdict(list)
        run(row, 1, lambda name, x: found[name].append(x.detach().clone()) if name in short else None)
        return found

    with contextlib.suppress(Exception):  # a forward may need whole batches; what else it raises comes again
        one, all_rows = rows(1), rows(batch.samples)
        short = [name for name, of_one in one.items() if of_one and all_rows[name] < batch.samples * of_one]
        if short and len(short) < len(one):  # some may read what no sample changes, such as a table of positions
            first, last = inputs(0), inputs(batch.samples - 1)
            short = [name for name in short if not _same(first[name], last[name])]
        if short:
            name = short[0]
            return (
                f"the forward takes only some of {batch.samples} calibration samples in a batch: {name} gets "
                f"{all_rows[name]} rows of them, and {one[name]} of one"
            )
    return None


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(_equal, first, second))


def _equal(one: Tensor, other: Tensor) -> bool:
    """True for the same values, NaN among them: what no sample changes may hold some."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
