"""The training of a whole model by the divergence from its float model: `Training`.

Tested by tests/finish/test_finish_model.py: with whole finishes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.device.memory import Peak, give_back, peak_bytes
from gptq_plugin.finish.blocks import checkpointed
from gptq_plugin.finish.descent import Descent, Pace, draw_as_before
from gptq_plugin.finish.interruption import Interruption
from gptq_plugin.finish.logits import LogitReader
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.student import Student
from gptq_plugin.finish.teacher import Lesson
from gptq_plugin.finish.top_logits import TopDivergence
from gptq_plugin.report.finish_record import Judgement

log = logging.getLogger(__name__)


class Training(Descent):
    """Trains a model's student by KL(float || quantized).

    Args:
        model: With the student in it, on the device and in evaluation mode.
        student: What is trained.
        run: Runs the data of a batch.
        lessons: To train on.
        held_out: To judge on, by their numbers over all ranks.
        options: How.
        device: Where the model is.
        memory: Bytes of the device that may be used; None is all.
    """

    what = "divergence"

    def __init__(
        self,
        model: nn.Module,
        student: Student,
        run: Callable[[nn.Module, Any], Any],
        lessons: Sequence[Lesson],
        held_out: Mapping[int, Lesson],
        options: Finish,
        device: torch.device,
        memory: int | None = None,
    ) -> None:
        pace = Pace(options.steps, options.tokens_per_step, options.judgements, options.patience, options.seed)
        rates = [
            (student.ratios, options.learning_rate),
            (list(student.latent.values()), options.code_learning_rate),
            (student.masters, options.rate_of_norms),
        ]
        super().__init__(student, rates, [len(one.top) for one in lessons], pace, device)
        self._model, self._run, self._lessons, self._held_out = model, run, lessons, held_out
        self._options, self._memory = options, memory
        self._reader = LogitReader(model)
        self._reruns = bool(options.checkpoint_activations)

    def train(self, progress: Callable[[int, Judgement], None], interruption: Interruption) -> list[Tensor]:
        with self._reader.watching():
            return super().train(progress, interruption)

    def _learn(self, number: int) -> Tensor:
        lesson = self._lessons[number]
        try:
            return self._backward(lesson)
        except torch.OutOfMemoryError:
            if self._options.checkpoint_activations is not None or self._reruns:
                raise
            self._rerun("there was no room")
        return self._backward(lesson)

    def _backward(self, lesson: Lesson) -> Tensor:
        with self._student.taking_gradients():
            divergence = self._forward(lesson)
            divergence.backward()  # type: ignore[no-untyped-call]
        peak = peak_bytes(self._device)
        if peak is not None and self._memory is not None and peak > self._memory and not self._reruns:
            self._rerun(f"{peak / 2**20:.0f} MiB were in use, and {self._memory / 2**20:.0f} are allowed")
        return divergence.detach()

    def _rerun(self, why: str) -> None:
        if self._options.checkpoint_activations is None:
            log.info("finish: activations are computed twice from here on: %s on %s", why, self._device)
            self._reruns = True
            give_back(self._device)
            Peak(self._device)

    def _forward(self, lesson: Lesson) -> Tensor:
        draw_as_before(self._device)
        with checkpointed(self._model) if self._reruns else contextlib.nullcontext():
            return self._divergence(lesson)

    def _divergence(self, lesson: Lesson) -> Tensor:
        logits = lesson.counted(self._read(lesson))
        found: Tensor = TopDivergence.apply(logits, lesson.top.to(self._device))
        return found

    def _read(self, lesson: Lesson) -> Tensor:
        what, untrained = "a batch of the finish", self.steps == 0  # later ones may be the learning rate's doing
        return self._reader.read(lambda: self._run(self._model, lesson.data), what, finite=untrained)

    def _measure(self) -> dict[int, tuple[float, int]]:
        sums = {}
        for number, lesson in self._held_out.items():
            draw_as_before(self._device)
            logits = lesson.counted(self._read(lesson))
            sums[number] = (lesson.top.to(self._device).divergence(logits), len(lesson.top))
        return sums
