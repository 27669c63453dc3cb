"""A pass, which begins again with fewer samples in a forward if one lacks memory: `run_pass`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.calibration.joined import divided
from gptq_plugin.device.memory import give_back, is_shortage
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.one_pass import OnePass
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.report.report import QuantizeReport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ran:
    """A pass that ran.

    Attributes:
        one_pass: The pass.
        layers, report: As `OnePass.run` returns them.
    """

    one_pass: OnePass
    layers: dict[str, QuantLinear]
    report: QuantizeReport


def run_pass(
    plan: Plan,
    calibration: Calibration,
    begin: Callable[[contextlib.ExitStack], PassOptions],
    around: contextlib.ExitStack,
) -> Ran:
    """Runs a pass; where a forward lacks memory, half as many samples run in one, from the beginning.

    A pass changes nothing before it ends, so that the sums are those of one that began with fewer. That is for samples
    that were given one by one, without `batch_size`; several ranks, and passes that keep something for others, end with
    the error.

    Args:
        plan: The layers.
        calibration: This rank's batches.
        begin: Enters what a pass writes to, and returns its options.
        around: Is left after the last pass; what others entered is left before the next one.

    Raises:
        CalibrationError, TargetError: As `OnePass.run`.
        torch.OutOfMemoryError: There is no room for a forward of one sample, or for other work; with what to change.
    """
    most: int | None = None
    while True:
        with contextlib.ExitStack() as own:
            options = dataclasses.replace(begin(own), most_samples=most)
            one_pass = OnePass(plan, calibration, options)
            try:
                layers, report = one_pass.run()
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
                most = _fewer(one_pass, plan, options)
                if most is None:
                    raise _explained(error, one_pass.runs, plan, options) from error
            else:
                around.push(own.pop_all())
                return Ran(one_pass, layers, report)
        device = one_pass.runs.device
        told = f"a forward of calibration samples lacked memory on {device}: the pass began again with up to {most}"
        log.warning("%s", told)
        del one_pass
        give_back(device)
        calibration = divided(calibration, most)
        calibration = dataclasses.replace(calibration, deviations=[*calibration.deviations, told])


def _fewer(one_pass: OnePass, plan: Plan, options: PassOptions) -> int | None:
    """How many samples may run in a forward after one has lacked memory; None if that is not to be chosen."""
    batch = next(reversed(one_pass.runs.ran_short), None)
    if batch is None or not batch.given_apart or batch.samples < 2:
        return None
    if plan.config.batch_size is not None or options.keeps or distributed.active():
        return None
    return batch.samples // 2


@contextlib.contextmanager
def shortage_explained(runs: BatchRuns, plan: Plan, options: PassOptions) -> Iterator[None]:
    """Raises an error of the block for lack of memory as `run_pass` does, with what to change."""
    try:
        yield
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise _explained(error, runs, plan, options) from error


def _explained(error: RuntimeError, runs: BatchRuns, plan: Plan, options: PassOptions) -> torch.OutOfMemoryError:
    """The error with what lacked memory and what needs less."""
    device, batch = runs.device, next(reversed(runs.ran_short), None)
    what, less = "the work on a layer", []
    if batch is not None:
        what = f"a forward of calibration samples ({batch.samples})"
        fewer = f"batch_size={batch.samples // 2}" if batch.given_apart else "batches of fewer samples"
        less.append(fewer if batch.samples > 1 else "shorter samples")
    if device.type == "cuda":
        streams = plan.targets[0].parameter.device.type == "cpu"
        less += ["offload_activations=True"] if not options.offload_activations else []
        less += ["offload_weights=True"] if streams and not options.offload_weights else []
    else:
        less.append("a smaller nsamples")
    return torch.OutOfMemoryError(
        f"{what} lacked memory on {device}; the model is as it was, and nothing was exported. Give "
        f"{', or '.join([*less, 'a device with more memory'])} ({error})"
    )
