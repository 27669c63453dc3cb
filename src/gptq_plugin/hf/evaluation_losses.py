"""The losses of a Trainer's evaluation by batch and sample, `losses_of`; and what a user's function may return,
`as_metric`.

A Trainer returns the mean of its batches' losses. `prediction_step` gives each of them, whatever a subclass computes.

Tested by tests/hf/test_validation.py: with the trainers that evaluate.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from gptq_plugin.training.samples import Chosen, Samples

_TOLERANCE = 1e-4  # between the trainer's mean and that of its batches; of a duplicate on the last rank it is more


@dataclass
class _Batches:
    """Losses of one evaluation on this rank; not yet read from the device.

    Attributes:
        losses, weights, keys: Of the batches.
        precisions: Of the losses' dtypes.
        chosen: Batches to run sample by sample, with what `prediction_step` had beside them.
        single: The samples' losses, by the batch's number.
        why: Why there are none.
    """

    losses: list[Tensor] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    precisions: list[float] = field(default_factory=list)
    chosen: Chosen[Any] = field(default_factory=Chosen)
    single: dict[int, list[Tensor]] = field(default_factory=dict)
    why: str = ""

    def samples(self) -> Samples | None:
        """What is known of the loss's samples; None if the batches are single ones."""
        if self.chosen.are_ones:
            return None
        divided = []
        for number in [] if self.why else self.chosen.kept:
            found = [(float(loss), 1.0) for loss in self.single.get(number, [])]
            own = float(self.losses[number]), self.weights[number], found, self.precisions[number]
            one = self.chosen.divided(number, *own)
            if one is None:
                return Samples(why="there is not one loss for each sample")
            divided.append(one)
        return Samples(divided, sum(self.chosen.sizes), self.why)


@dataclass
class Losses:
    """Losses of a trainer's evaluations, by the name of the metric that is their mean."""

    found: dict[str, _Batches] = field(default_factory=dict)

    def measured(self, name: str, value: float | None) -> float | None:
        """The metric with its batches, if it is their mean. In a process group every rank calls it."""
        if value is None or name not in self.found:
            return value
        mine = self.found[name]
        here = [float(loss) for loss in mine.losses], mine.weights, mine.keys, [mine.samples()]
        losses, weights, keys, samples = (
            [one for part in parts for one in part] for parts in zip(*distributed.gather_objects(here), strict=True)
        )
        known = Samples.over_ranks(one for one in samples if one is not None) if any(samples) else None
        mean = Measured.mean(losses, weights, keys, known) if losses else math.nan
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
        lacks = distributed.gather_objects(len(batches.losses) != len(batches.chosen.sizes))
        run = _single_step(trainer, step, batches)
        batches.why = "not every batch has a loss" if any(lacks) else batches.chosen.run(run)
        return result

    def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        key, size = digest(inputs), find_batch_size(inputs)
        if running is not None:
            running.chosen.add(model, inputs)  # a step may take keys out of them
        result = step(model, inputs, *args, **kwargs)
        if running is not None and result[0] is not None and size is not None:
            running.losses.append(result[0].detach().float().mean())
            running.precisions.append(torch.finfo(result[0].dtype).eps if result[0].is_floating_point() else 0.0)
            running.weights.append(size)
            running.keys.append(key)
        return result

    with _replaced(trainer, evaluation_loop=evaluation_loop, prediction_step=prediction_step):
        yield losses


def _single_step(trainer: Trainer, step: Callable[..., Any], batches: _Batches) -> Callable[[int, Any, Any], None]:
    apart = copy.copy(trainer)
    vars(apart).update({name: _containers(value) for name, value in vars(trainer).items() if "dataset" not in name})
    bound = step.__func__.__get__(apart) if getattr(step, "__self__", None) is trainer else step  # type: ignore[attr-defined]

    def run(number: int, model: Any, sample: Any) -> None:
        loss = bound(model, sample, True)[0]
        if loss is not None:
            batches.single.setdefault(number, []).append(loss.detach().float().mean())

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
