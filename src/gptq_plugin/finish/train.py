"""The training of a whole model by the divergence from its float model: `Training`.

Tested by tests/finish/test_finish_model.py: with whole finishes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from gptq_plugin.finish.recorder import Gradients, Recorder
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
        draw = partial(draw_as_before, self._device)
        what = "a step of the model as a whole"
        self._recorder = Recorder(self._gradients_of, model, draw, self._device, surroundings.memory, what)

    def train(self, progress: Callable[[int, Judgement], None], interruption: Interruption) -> list[Tensor]:
        with self._reader.watching():
            try:
                return super().train(progress, interruption)
            finally:
                self._recorder.forget()

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
        if task is not None:
            draw_as_before(self._device)  # as for the divergence
            loss = self._forward(lambda: self._task(task, lesson))
            of_task = self._student.gradients_of(weight * len(lesson.top) * loss)
            self._refuse_unmoved(of_task)
        divergence, gradients = self._gradients(lesson)
        if task is not None:
            if not self._is_told:
                self._tell_unmoved(self._unmoved(of_task) - self._unmoved(gradients))
            self._student.add(of_task)
        self._student.add(gradients)
        peak, allowed = peak_bytes(self._device), self._surroundings.memory
        if peak is not None and allowed is not None and peak > allowed and not self._reruns:
            self._rerun(f"{peak / 2**20:.0f} MiB were in use, and {allowed / 2**20:.0f} are allowed")
        return divergence

    def _rerun(self, why: str) -> None:
        if self._options.checkpoint_activations is None:
            log.info("finish: activations are computed twice from here on: %s on %s", why, self._device)
            self._reruns = True
            self._recorder.forget()
            give_back(self._device)
            Peak(self._device)

    def _forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """Computes what is to run backward."""
        with checkpointed(self._model) if self._reruns else contextlib.nullcontext():
            return compute()

    def _gradients(self, lesson: Lesson) -> tuple[Tensor, Gradients]:
        """The divergence of a batch, and its gradients, as a share beside the run's own loss."""
        if self.steps and not self._reruns and self._surroundings.task is None:
            return self._recorder(lesson, partial(lesson.on, self._device))
        draw_as_before(self._device)
        return self._gradients_of(lesson)

    def _gradients_of(self, lesson: Lesson) -> tuple[Tensor, Gradients]:
        divergence = self._forward(lambda: self._divergence(lesson))
        share = (1 - self._options.task_weight) * divergence
        return divergence.detach(), self._student.gradients_of(share)

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

    def _refuse_unmoved(self, gradients: Gradients) -> None:
        """Raises CalibrationError if the run's own loss has gradients of nothing that is trained."""
        if all(gradient is None for gradient in gradients):
            raise CalibrationError(
                f"task_weight={self._options.task_weight:g} trains by a loss that does not depend on the quantized "
                "model: what gives it (a training_step, a task_loss) has to run the model that is quantized, the one "
                "it is called with, and no copy"
            )

    def _unmoved(self, gradients: Gradients) -> set[str]:
        """The layers whose scales have no gradient."""
        return {name for name, gradient in zip(self._student.layers, gradients, strict=False) if gradient is None}

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
