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
class BlockRecord:
    """The training of a block. Errors are of its outputs on the held-out samples, squared, as a share of what the float
    block changes.

    Attributes:
        name: The block's.
        before: Error where its training began, behind the trained blocks before it.
        after: The best that was reached.
        best_step: The steps up to that.
        steps: Steps that were made.
        solved: Whether it began with codes that were solved anew; else with those that GPTQ gave.
    """

    name: str
    before: float
    after: float
    best_step: int
    steps: int
    solved: bool = False

    def summary(self) -> str:
        """The result in a sentence."""
        errors = f"error from {format_value(self.before)} to {format_value(self.after)}"
        anew = "solved anew, " if self.solved else ""
        return f"{self.name}: {anew}{errors} in {self.best_step} of {self.steps} steps"


@dataclass(frozen=True)
class FinishRecord:
    """The training of a quantized model towards its float model. Divergences are KL(float || quantized), the mean over
    positions, in nats. Those of `curve` count all but the float model's most likely tokens as one; `before` and `after`
    are of the quantized layers as they are exported, and count as many tokens singly as memory has room for, or all.

    Attributes:
        kind: What was trained, as in `Finish.kind`.
        kept: True if the model has the result.
        reason: Why, in a sentence.
        before: Divergence of what GPTQ gave, on the held-out samples.
        after: The best that was reached there.
        best_step: The steps up to that, behind the blocks.
        steps: Steps that were made, behind the blocks.
        tokens: Positions trained on, over all steps and ranks.
        samples: Samples trained on, over all ranks.
        held_out_tokens: Positions judged on, over all ranks.
        data: Source of the samples, in a few words; empty if unknown.
        data_sha256: Digest of all samples (`batches.digest`).
        seconds: Time it took.
        options: The finish's options, as asked for.
        curve: The judgements, in order.
        blocks: What training each block gave, in order; none if they were not trained one by one.
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
    blocks: Sequence[BlockRecord] = ()

    def undone(self, reason: str) -> FinishRecord:
        """The record of a result that was taken back."""
        return dataclasses.replace(self, kept=False, reason=reason)

    def summary(self) -> str:
        """The result in a sentence."""
        held_out = f"KL to the float model on {self.held_out_tokens} held-out positions"
        blocks = f"{len(self.blocks)} blocks and " if self.blocks else ""
        if not self.kept and not self.after < self.before:
            return (
                f"finish ({self.kind}): not kept, since {held_out}, {format_value(self.before)}, was no lower behind "
                f"{blocks}{self.steps} steps on {self.samples} samples: {self.reason}"
            )
        change = format_percent(self.after / self.before - 1) if self.before > 0 else ""
        change = f" ({change})" if change and math.isfinite(self.after) else ""
        return (
            f"finish ({self.kind}): {held_out} from {format_value(self.before)} to {format_value(self.after)}{change} "
            f"in {blocks}{self.best_step} of {self.steps} steps on {self.samples} samples; "
            f"{'kept' if self.kept else 'not kept'}: {self.reason}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of a table: a head, and a row for each block and each judgement."""
        head = ("step", "KL in training", "KL held out")
        blocks = [
            (
                f"{one.name}, {'solved anew, ' if one.solved else ''}{one.best_step} of {one.steps}",
                f"error {format_value(one.before)}",
                f"to {format_value(one.after)}",
            )
            for one in self.blocks
        ]
        return [
            head,
            *blocks,
            *((str(one.step), format_value(one.training), format_value(one.held_out)) for one in self.curve),
        ]
