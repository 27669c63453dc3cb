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

from gptq_plugin.device.memory import Peak, give_back, is_shortage, peak_bytes
from gptq_plugin.errors import CalibrationError, some
from gptq_plugin.finish.blocks import checkpointed
from gptq_plugin.finish.descent import Descent, Pace, draw_as_before
from gptq_plugin.finish.interruption import Interruption
from gptq_plugin.finish.logits import LogitReader
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.student import Student
from gptq_plugin.finish.surroundings import Surroundings
from gptq_plugin.finish.teacher import Lesson
from gptq_plugin.finish.top_logits import Divergence
from gptq_plugin.report.finish_record import Judgement

log = logging.getLogger(__name__)


class Training(Descent):
    """Trains a model's student by KL(float || quantized), and by a share of the run's own loss.

    Args:
        model: With the student in it, on the device and in evaluation mode.
        student: What is trained.
        surroundings: How a batch is run, and where the model is.
        lessons: To train on.
        held_out: To judge on, by their numbers over all ranks.
        options: How.
    """

    what = "divergence"

    def __init__(
        self,
        model: nn.Module,
        student: Student,
        surroundings: Surroundings,
        lessons: Sequence[Lesson],
        held_out: Mapping[int, Lesson],
        options: Finish,
    ) -> None:
        patience = options.patience_with(codes=bool(student.latent))
        pace = Pace(options.steps, options.tokens_per_step, options.judgements, patience, options.seed)
        rates = student.with_rates(options.rates)
        super().__init__(student, rates, [len(one.top) for one in lessons], pace, surroundings.device)
        self._model, self._lessons, self._held_out = model, lessons, held_out
        self._options, self._surroundings = options, surroundings
        if surroundings.task is not None:
            self.what = "divergence or the run's own loss"
        self._reader = LogitReader(model)
        self._reruns = bool(options.checkpoint_activations)
        self._is_told = False

    def train(self, progress: Callable[[int, Judgement], None], interruption: Interruption) -> list[Tensor]:
        with self._reader.watching():
            return super().train(progress, interruption)

    def _learn(self, number: int) -> Tensor:
        lesson = self._lessons[number]
        try:
            return self._backward(lesson)
        except RuntimeError as error:
            if not is_shortage(error) or self._options.checkpoint_activations is not None or self._reruns:
                raise
            self._rerun("there was no room")
        return self._backward(lesson)

    def _backward(self, lesson: Lesson) -> Tensor:
        weight, task = self._options.task_weight, self._surroundings.task
        with self._student.taking_gradients():
            if task is not None:
                loss = self._forward(lambda: self._task(task, lesson))
                _backward(weight * len(lesson.top) * loss, self._student)
                self._refuse_unmoved()
                missed = set() if self._is_told else self._unmoved()
            divergence = self._forward(lambda: self._divergence(lesson))
            _backward((1 - weight) * divergence, self._student)
            if task is not None and not self._is_told:
                self._tell_unmoved(missed - self._unmoved())
        peak, allowed = peak_bytes(self._device), self._surroundings.memory
        if peak is not None and allowed is not None and peak > allowed and not self._reruns:
            self._rerun(f"{peak / 2**20:.0f} MiB were in use, and {allowed / 2**20:.0f} are allowed")
        return divergence.detach()

    def _rerun(self, why: str) -> None:
        if self._options.checkpoint_activations is None:
            log.info("finish: activations are computed twice from here on: %s on %s", why, self._device)
            self._reruns = True
            give_back(self._device)
            Peak(self._device)

    def _forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """Computes what is to run backward; it draws the same random numbers each time."""
        draw_as_before(self._device)
        with checkpointed(self._model) if self._reruns else contextlib.nullcontext():
            return compute()

    def _task(self, task: Callable[[nn.Module, Any], Tensor], lesson: Lesson) -> Tensor:
        """The run's own loss of a batch."""
        loss = task(self._model, lesson.data)
        check_loss(loss, self._options.task_weight)
        if self.steps == 0 and not torch.isfinite(loss):
            raise CalibrationError(
                f"task_weight={self._options.task_weight:g}: the loss of a batch is {loss.item()}: look for broken "
                "samples, such as those without a label, or leave task_weight out"
            )
        return loss.reshape(())

    def _refuse_unmoved(self) -> None:
        """Raises CalibrationError if a backward of the run's own loss has reached nothing that is trained."""
        if all(leaf.grad is None for leaf in self._student.leaves):
            raise CalibrationError(
                f"task_weight={self._options.task_weight:g} trains by a loss that does not depend on the quantized "
                "model: what gives it (a training_step, a task_loss) has to run the model that is quantized, the one "
                "it is called with, and no copy"
            )

    def _unmoved(self) -> set[str]:
        """The layers that no backward has reached."""
        return {name for name, layer in self._student.layers.items() if layer.log_ratio.grad is None}

    def _tell_unmoved(self, layers: set[str]) -> None:
        """Warns of layers that the model's outputs depend on, and the run's own loss does not: what gives it may hold
        layers of its own, in a list beside the model."""
        self._is_told = True
        if layers:
            log.warning(
                "task_weight=%g: the loss of the run does not depend on %d of %d quantized layers (%s): what gives it "
                "takes what the model computes before them, or runs others in their place, which it holds itself",
                self._options.task_weight,
                len(layers),
                len(self._student.layers),
                some(sorted(layers)),
            )

    def _divergence(self, lesson: Lesson) -> Tensor:
        logits = lesson.counted(self._read(lesson))
        found: Tensor = Divergence.apply(logits, lesson.top.to(self._device))
        return found

    def _read(self, lesson: Lesson) -> Tensor:
        what, untrained = "a batch of the finish", self.steps == 0  # later ones may be the learning rate's doing
        return self._reader.read(lambda: self._surroundings.run(self._model, lesson.data), what, finite=untrained)

    def _measure(self) -> dict[int, tuple[float, int]]:
        sums = {}
        for number, lesson in self._held_out.items():
            draw_as_before(self._device)
            logits = lesson.counted(self._read(lesson))
            sums[number] = (lesson.top.to(self._device).divergence(logits), len(lesson.top))
        return sums


def check_loss(loss: Any, task_weight: float) -> None:
    """Raises CalibrationError if what a run gives for a batch is no loss to train by."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CalibrationError(
            f"task_weight={task_weight:g} trains by a loss of every batch, a scalar with a gradient: "
            f"what gives it (a training_step, a task_loss) returned {found}"
        )


def _backward(loss: Tensor, student: Student) -> None:
    """Adds gradients to what the student trains, and to no other parameter that the loss depends on."""
    loss.backward(inputs=student.leaves)  # type: ignore[no-untyped-call]
