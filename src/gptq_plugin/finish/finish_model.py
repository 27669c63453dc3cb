"""The finish of a quantized model, from its float model's predictions to what is kept: `finish_model`."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.device.memory import Peak, give_back
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.rows import Rows
from gptq_plugin.finish.student import Student
from gptq_plugin.finish.teacher import ask_teacher
from gptq_plugin.finish.train import Training
from gptq_plugin.report.finish_record import FinishRecord, Judgement

log = logging.getLogger(__name__)

Teacher = Callable[[], contextlib.AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Surroundings:
    """Where and how a finish runs.

    Attributes:
        run: Runs the data of a batch, with all its logits.
        device: Where.
        memory: Bytes of it that may be used; None is all.
        token_weighting: Which positions count, as in QuantizeConfig.
        progress: Called as progress(steps done, steps at most, what held-out samples tell).
    """

    run: Callable[[nn.Module, Any], Any]
    device: torch.device
    memory: int | None = None
    token_weighting: str = "all"
    progress: Callable[[int, int, str], None] | None = None


@dataclass(frozen=True)
class Finished:
    """A finish that was made.

    Attributes:
        record: For the report.
        deviations: Differences from the request, a sentence each.
        undo: Gives the model back what GPTQ gave it; nothing happens if that was kept.
    """

    record: FinishRecord
    deviations: list[str]
    undo: Callable[[], None]


def finish_model(
    model: nn.Module, teacher: Teacher, rows: Rows, options: Finish, surroundings: Surroundings
) -> Finished:
    """Trains a quantized model towards a float one, and gives it the result if that is better on held-out samples.

    In a process group every rank calls it, with the same models and its own rows; all get the same result.

    Args:
        model: With `QuantLinear` layers, in evaluation mode. Its codes do not change.
        teacher: Its context is the float model on the device, in evaluation mode; `model` is quantized again behind it.
        rows: The samples.
        options: How to train.
        surroundings: Where.

    Raises:
        TargetError, CalibrationError: As `ask_teacher` and `Student.of`; or the models predict other numbers of
            classes. The model is as it was.
    """
    started = time.perf_counter()
    device = surroundings.device
    with teacher() as float_model:
        asked = surroundings.run, surroundings.token_weighting, options.top_logits
        lessons, told = ask_teacher(float_model, rows.batches, *asked)
    give_back(device)
    Peak(device)  # measured anew
    held_out = dict(zip(rows.numbers, lessons[len(rows.train) :], strict=True))
    with Student.of(model, device, norms=options.rate_of_norms > 0) as student:
        training = Training(model, student, surroundings.run, lessons[: len(rows.train)], held_out, options, device,
                            surroundings.memory)  # fmt: skip
        _log(f"finish ({options.kind}): {rows.samples} samples to train on, at most {options.steps} steps")
        values = training.train(_telling(options, surroundings.progress))
        student.set_values(values)
        scales, norms = student.outcome()
    best, before = training.best, training.curve[0].held_out
    kept = math.isfinite(best.held_out) and best.held_out < before
    record = FinishRecord(
        options.kind,
        kept,
        f"{training.ended}; " + ("held-out samples are nearer to the float model" if kept else "GPTQ's result is best"),
        before,
        best.held_out,
        best.step,
        training.steps,
        training.tokens,
        rows.samples,
        _tokens(held_out.values()),
        "; ".join(f"{count} samples of {source}" for source, count in rows.sources.items()),
        rows.digest,
        time.perf_counter() - started,
        options.to_dict(),
        training.curve,
    )
    _log(record.summary())
    told = [one for of_rank in distributed.gather_objects(told) for one in of_rank]
    deviations = list(dict.fromkeys([*told, *(f"finish: {one}" for one in rows.deviations), *training.over_memory()]))
    return Finished(record, deviations, _give(model, scales, norms) if kept else _nothing)


@torch.no_grad()
def _give(model: nn.Module, scales: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Callable[[], None]:
    """Puts scales and norms into the model; returns what puts the earlier ones back."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in scales}
    old_scales = {name: layer.scales for name, layer in layers.items()}
    old_norms = {name: model.get_parameter(name).detach().clone() for name in norms}
    for name, layer in layers.items():
        layer.scales = scales[name].to(layer.device)  # not in place: the tensor may be that of a file
    _write(model, norms)

    def undo() -> None:
        for name, layer in layers.items():
            layer.scales = old_scales[name]
        _write(model, old_norms)

    return undo


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def _telling(options: Finish, progress: Callable[[int, int, str], None] | None) -> Callable[[int, Judgement], None]:
    def tell(steps: int, judgement: Judgement) -> None:
        _log(f"finish: after {steps} of {options.steps} steps, KL to the float model {judgement.held_out:.5g} held out")
        if progress is not None:
            progress(steps, options.steps, f"KL {judgement.held_out:.4g}")

    return tell


def _tokens(lessons: Any) -> int:
    return sum(distributed.gather_objects(sum(len(lesson.top) for lesson in lessons)))


def _log(text: str) -> None:
    if distributed.rank() == 0:
        log.info("%s", text)


def _nothing() -> None:
    pass
