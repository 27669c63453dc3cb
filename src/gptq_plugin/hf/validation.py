"""`Validation`: a Trainer's metrics before and after quantization.

A Trainer gives callbacks no way to evaluate, so the user hands one over: `trainer.evaluate`. That measures what the
trainer measures, whatever its subclass computes, on all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import Trainer

from gptq_plugin.hf.evaluation_losses import as_metric, losses_of
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.options import fields
from gptq_plugin.training.attempts import Quality
from gptq_plugin.training.quality_gate import QualityGate

Validate = Callable[[], Mapping[str, Any]]

_KIND = fields.optional(
    fields.Kind("a function that returns metrics, such as trainer.evaluate", callable), "nothing is measured"
)
_TIMES = ("runtime", "per_second", "compilation_time", "epoch")  # what Trainer adds to its metrics


class Validation:
    """Measures the model with the user's function, and judges it.

    Args:
        validate: Returns metrics by name, each a number, or a sequence of numbers, one for each sample, whose mean is
            the metric; None measures nothing.
        gate: Limits for them.

    Attributes:
        measuring: True while the function runs.

    Raises:
        ValueError: `validate` is no function, or there are limits and none is given.
    """

    def __init__(self, validate: Validate | None, gate: QualityGate) -> None:
        _KIND.check("validate", validate)
        if gate.limits and validate is None:
            raise ValueError(
                "max_degradation needs a function that measures: trainer.add_callback(GPTQTrainerCallback(..., "
                "validate=trainer.evaluate, max_degradation=...))"
            )
        self.validate, self.gate = validate, gate
        self.measuring = False

    def check_model(self, model: nn.Module) -> None:
        """Refuses a model that the function could not measure quantized, before training."""
        if self.validate is not None and has_adapters(model):
            raise ValueError(
                "validate measures the trainer's model, and of a model with PEFT adapters a merged copy is quantized: "
                "leave validate and max_degradation out, and evaluate the export"
            )

    def check_names(self, logged: Iterable[str]) -> None:
        """Refuses limits of metrics that an evaluation in training does not give, where validation is the same."""
        if self._trainer is not None and not isinstance(self._trainer.eval_dataset, dict):
            self.gate.check_names(logged)

    @property
    def _trainer(self) -> Trainer | None:
        """The trainer whose `evaluate` measures."""
        trainer = getattr(self.validate, "__self__", None)
        return trainer if isinstance(trainer, Trainer) else None

    def of_float_model(self) -> Quality:
        """Measures the float model; returns how the quantized one is measured and judged by it.

        Raises:
            ValueError: A limit's metric is not measured, or not so that its confidence can be told.
            QualityError: It is not finite.
        """
        before = self._measure() if self.validate is not None else {}
        self.gate.check_before(before)
        return Quality(self.gate, before, self._measure)

    def _measure(self) -> dict[str, float]:
        assert self.validate is not None
        with self._measuring(), losses_of(self._trainer) as losses:
            found = self.validate()
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"validate must return a mapping from names to numbers; got {fields.shown(found)}")
        values = {name: losses.measured(name, as_metric(value)) for name, value in found.items()}
        return {
            name: value
            for name, value in values.items()
            if value is not None and (name in self.gate.limits or not name.endswith(_TIMES))
        }

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        self.measuring = True
        try:
            yield
        finally:
            self.measuring = False
