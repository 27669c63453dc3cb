"""What a finish did, and why it was kept or not: `FinishRecord`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptq_plugin.report.numbers import format_percent, format_value


@dataclass(frozen=True)
class Judgement:
    """What the held-out samples tell after some steps.

    Attributes:
        step: Number of steps.
        training: Mean divergence of the batches trained on since the last judgement, in nats; NaN before the first
            step.
        held_out: That of the held-out samples, with scales as they would be exported.
    """

    step: int
    training: float
    held_out: float


@dataclass(frozen=True)
class FinishRecord:
    """The training of a quantized model towards its float model. Divergences are KL(float || quantized), the mean over
    positions, in nats; all but the float model's most likely tokens count as one.

    Attributes:
        kind: What was trained, as in `Finish.kind`.
        kept: True if the model has the result.
        reason: Why, in a sentence.
        before: Divergence of what GPTQ gave, on the held-out samples.
        after: The best that was reached there.
        best_step: The steps up to that.
        steps: Steps that were made.
        tokens: Positions trained on, over all steps and ranks.
        samples: Samples trained on, over all ranks.
        held_out_tokens: Positions judged on, over all ranks.
        data: Source of the samples, in a few words; empty if unknown.
        data_sha256: Digest of all samples (`batches.digest`).
        seconds: Time it took.
        options: The finish's options, as asked for.
        curve: The judgements, in order.
    """

    kind: str
    kept: bool
    reason: str
    before: float
    after: float
    best_step: int
    steps: int
    tokens: int
    samples: int
    held_out_tokens: int
    data: str = ""
    data_sha256: str = ""
    seconds: float = math.nan
    options: dict[str, Any] = field(default_factory=dict)
    curve: Sequence[Judgement] = ()

    def undone(self, reason: str) -> FinishRecord:
        """The record of a result that was taken back."""
        return dataclasses.replace(self, kept=False, reason=reason)

    def summary(self) -> str:
        """The result in a sentence."""
        change = format_percent(self.after / self.before - 1) if self.before > 0 else ""
        change = f" ({change})" if change and math.isfinite(self.after) else ""
        return (
            f"finish ({self.kind}): KL to the float model on {self.held_out_tokens} held-out positions from "
            f"{format_value(self.before)} to {format_value(self.after)}{change} in {self.best_step} of {self.steps} "
            f"steps on {self.samples} samples; {'kept' if self.kept else 'not kept'}: {self.reason}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of a table: a head, and a row for each judgement."""
        head = ("step", "KL in training", "KL held out")
        return [head, *((str(one.step), format_value(one.training), format_value(one.held_out)) for one in self.curve)]
