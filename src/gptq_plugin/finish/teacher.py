"""What the float model predicts for each batch, computed once: `ask_teacher`.

Tested by tests/finish/test_finish_model.py: with what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.calibration.collect import Batch
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.finish.logits import LogitReader
from gptq_plugin.finish.top_logits import TopLogits


@dataclass(frozen=True)
class Lesson:
    """A batch, and what the float model predicts for it.

    Attributes:
        data: The forward's input.
        shape: Of the logits, but for the classes.
        places: int64, the positions that count among all of them; None if all do.
        top: At those that count.
    """

    data: Any
    shape: torch.Size
    places: Tensor | None
    top: TopLogits

    def counted(self, logits: Tensor) -> Tensor:
        """The logits of positions that count, [positions, classes], of another forward of the batch."""
        rows = logits.flatten(0, -2)
        return rows if self.places is None else rows[self.places.to(rows.device)]


def ask_teacher(
    model: nn.Module, batches: Sequence[Batch], run: Callable[[nn.Module, Any], Any], token_weighting: str, k: int
) -> tuple[list[Lesson], list[str]]:
    """Runs the float model on batches.

    Args:
        model: The float model, in evaluation mode.
        batches: This rank's.
        run: Runs the data of one.
        token_weighting: As in QuantizeConfig: which positions count.
        k: Tokens a position that are kept.

    Returns:
        A lesson for each batch, and sentences on positions that cannot be told from padding.

    Raises:
        TargetError, CalibrationError: As `LogitReader`; or a batch has no labels, and `token_weighting` is "labels".
    """
    reader, positions = LogitReader(model), Positions(model, batches, token_weighting)
    lessons: list[Lesson] = []
    told: dict[str, None] = {}
    with torch.no_grad(), positions.watching(), reader.watching():
        for number, batch in enumerate(batches):
            with positions.running(number):
                logits = reader.read(partial(run, model, batch.data), f"batch {number} of the finish")
                rows = positions.rows(number, reader.name, logits)
            if rows.remark is not None:
                told[f"finish: the output {rows.remark}"] = None
            places = None if rows.mask is None else rows.mask.nonzero()[:, 0].cpu()
            lessons.append(Lesson(batch.data, logits.shape[:-1], places, TopLogits.of(rows.counted, k)))
    return lessons, list(told)
