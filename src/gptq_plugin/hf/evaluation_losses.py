"""The losses of a Trainer's evaluation by batch, `losses_of`; and what a user's function may return, `as_metric`.

A Trainer returns the mean of its batches' losses. `prediction_step` gives each of them, whatever a subclass computes.

Tested by tests/hf/test_validation.py: with the trainers that evaluate.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import digest
from gptq_plugin.options import fields
from gptq_plugin.training.paired import Measured

_TOLERANCE = 1e-4  # between the trainer's mean and that of its batches; of a duplicate on the last rank it is more


@dataclass
class _Batches:
    """Losses of one evaluation on this rank; not yet read from the device."""

    losses: list[Tensor] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


@dataclass
class Losses:
    """Losses of a trainer's evaluations, by the name of the metric that is their mean."""

    found: dict[str, _Batches] = field(default_factory=dict)

    def measured(self, name: str, value: float | None) -> float | None:
        """The metric with its batches, if it is their mean. In a process group every rank calls it."""
        if value is None or name not in self.found:
            return value
        mine = self.found[name]
        here = [float(loss) for loss in mine.losses], mine.weights, mine.keys
        losses, weights, keys = (
            [one for part in parts for one in part] for parts in zip(*distributed.gather_objects(here), strict=True)
        )
        mean = Measured.mean(losses, weights, keys) if losses else math.nan
        return mean if math.isclose(mean, value, rel_tol=_TOLERANCE) else value


@contextlib.contextmanager
def losses_of(trainer: Trainer | None) -> Iterator[Losses]:
    """Inside the block the trainer's evaluations note their batches' losses. Without a trainer nothing is noted."""
    losses = Losses()
    if trainer is None:
        yield losses
        return
    loop, step = trainer.evaluation_loop, trainer.prediction_step
    name = ""

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        nonlocal name
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        losses.found[name] = _Batches()
        return loop(*args, **kwargs)

    def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        key, size = digest(inputs), find_batch_size(inputs)
        result = step(model, inputs, *args, **kwargs)
        if name and result[0] is not None and size is not None:
            batches = losses.found[name]
            batches.losses.append(result[0].detach().float().mean())
            batches.weights.append(size)
            batches.keys.append(key)
        return result

    with _replaced(trainer, evaluation_loop=evaluation_loop, prediction_step=prediction_step):
        yield losses


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
