"""The losses of a Trainer's evaluation by batch and sample, `losses_of`; and what a user's function may return,
`as_metric`.

A Trainer returns the mean of its batches' losses. `prediction_step` gives each of them, whatever a subclass computes.

Tested by tests/hf/test_validation.py: with the trainers that evaluate.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import digest
from gptq_plugin.options import fields
from gptq_plugin.training.paired import Measured
from gptq_plugin.training.samples import Chosen, Part

_TOLERANCE = 1e-4  # between the trainer's mean and that of its batches; of a duplicate on the last rank it is more


@dataclass
class _Batches:
    """Losses of one evaluation on this rank; not yet read from the device.

    Attributes:
        parts: Of the batches.
        chosen: Batches to run sample by sample, with what `prediction_step` had beside them.
        single: The losses of their samples.
    """

    parts: list[Part] = field(default_factory=list)
    chosen: Chosen[Any] = field(default_factory=Chosen)
    single: list[Part] = field(default_factory=list)


@dataclass
class Losses:
    """Losses of a trainer's evaluations, by the name of the metric that is their mean."""

    found: dict[str, _Batches] = field(default_factory=dict)

    def measured(self, name: str, value: float | None) -> float | None:
        """The metric with its batches, if it is their mean. In a process group every rank calls it."""
        if value is None or name not in self.found:
            return value
        mine = self.found[name]
        read = [replace(part, value=float(part.value)) for part in mine.parts]
        mean = Measured.over_ranks(distributed.gather_objects((read, mine.chosen.samples(read, mine.single))))
        return mean if math.isclose(mean, value, rel_tol=_TOLERANCE) else value


@contextlib.contextmanager
def losses_of(trainer: Trainer | None) -> Iterator[Losses]:
    """Inside the block the trainer's evaluations note their batches' losses, and those of the samples of some.

    The latter are evaluated by a copy of the trainer, so that what a subclass gathers for its own metrics is of batches
    alone. Without a trainer nothing is noted.
    """
    losses = Losses()
    if trainer is None:
        yield losses
        return
    loop, step = trainer.evaluation_loop, trainer.prediction_step
    running: _Batches | None = None

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        nonlocal running
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        running = batches = losses.found[name] = _Batches()
        result = loop(*args, **kwargs)
        running = None
        batches.chosen.run(_single_step(trainer, step, batches))
        return result

    def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        key, size = digest(inputs), find_batch_size(inputs)
        if running is not None:
            running.chosen.add(model, inputs)  # a step may take keys out of them
        result = step(model, inputs, *args, **kwargs)
        if running is not None and result[0] is not None and size is not None:
            loss, number = result[0].detach(), len(running.chosen.sizes) - 1
            precision = torch.finfo(loss.dtype).eps if loss.is_floating_point() else 0.0
            running.parts.append(Part(loss.float().mean(), size, number, key, precision))
        return result

    with _replaced(trainer, evaluation_loop=evaluation_loop, prediction_step=prediction_step):
        yield losses


def _single_step(trainer: Trainer, step: Callable[..., Any], batches: _Batches) -> Callable[[int, Any, Any], None]:
    """A step that notes the loss of a sample. Its first call copies the trainer, which may fail as any step may."""

    @functools.cache
    def apart() -> Callable[..., Any]:
        other = copy.copy(trainer)
        own = {name: _containers(value) for name, value in vars(trainer).items() if "dataset" not in name}
        vars(other).update(own)
        return step.__func__.__get__(other) if getattr(step, "__self__", None) is trainer else step  # type: ignore[attr-defined,no-any-return]

    def run(number: int, model: Any, sample: Any) -> None:
        loss = apart()(model, sample, True)[0]
        if loss is not None:
            batches.single.append(Part(loss.detach().float().mean(), 1.0, number))

    return run


def _containers(value: Any) -> Any:
    """A copy of nested lists and dictionaries; what is in them is shared."""
    if isinstance(value, dict):
        copied = copy.copy(value)  # a defaultdict stays one
        copied.update({key: _containers(one) for key, one in value.items()})
        return copied
    return copy.copy(value) if isinstance(value, (list, set, deque)) else value


@contextlib.contextmanager
def _replaced(trainer: Trainer, **methods: Any) -> Iterator[None]:
    """Gives the object other methods, and back what it had of its own."""
    own = {name: vars(trainer)[name] for name in methods if name in vars(trainer)}
    vars(trainer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(trainer)[name]
        vars(trainer).update(own)


def as_metric(value: Any) -> float | None:
    """A number as it is, a sequence of numbers as their mean; None for anything else.

    Numbers may be of NumPy or tensors.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if fields.is_number(value):
        return float(value)
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, Sequence) and value and all(map(fields.is_number, value)):
        return Measured.mean([float(one) for one in value], [1.0] * len(value))
    return None
