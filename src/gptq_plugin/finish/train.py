"""The steps of a finish, and the judgements between them: `Training`.

Tested by tests/finish/test_finish_model.py: with whole finishes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.device.memory import Peak, give_back, peak_bytes
from gptq_plugin.finish.interruption import Interruption
from gptq_plugin.finish.logits import LogitReader
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.student import Student, checkpointed
from gptq_plugin.finish.teacher import Lesson
from gptq_plugin.finish.top_logits import TopDivergence
from gptq_plugin.report.finish_record import Judgement

log = logging.getLogger(__name__)

_BETAS, _EPSILON, _WARM_UP = (0.9, 0.95), 1e-14, 0.05
_NOT_FINITE = "the divergence is not finite"


class Training:
    """Trains a student, and keeps what the held-out lessons tell is best. In a process group every rank makes its own
    training, of its own lessons; gradients are added up, and all have the same bytes in the end.

    Args:
        model: With the student in it, on the device and in evaluation mode.
        student: What is trained.
        run: Runs the data of a batch.
        lessons: To train on.
        held_out: To judge on, by their numbers over all ranks.
        options: How.
        device: Where the model is.
        memory: Bytes of the device that may be used; None is all.

    Attributes:
        curve: The judgements so far.
        steps: Steps so far.
        tokens: Positions trained on so far, over all ranks.
        best: The best judgement; that of step 0 is what the student began with.
        ended: Why the training ended.
    """

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
        self._model, self._student, self._run = model, student, run
        self._lessons, self._held_out = [one for one in lessons if len(one.top)], held_out
        self._options, self._device, self._memory = options, device, memory
        self._reader = LogitReader(model)
        self._reruns = bool(options.checkpoint_activations)
        self._waiting: list[Lesson] = []  # of this epoch
        self._generator = torch.Generator("cpu").manual_seed(options.seed)
        self._since = (0.0, 0)  # divergence and positions trained on since the last judgement
        self.curve: list[Judgement] = []
        self.steps = self.tokens = 0
        self.ended = f"all {options.steps} steps were made"
        self._optimizer = torch.optim.Adam(
            [
                {"params": student.ratios, "peak": options.learning_rate},
                {"params": student.masters, "peak": options.rate_of_norms},
            ],
            betas=_BETAS,
            eps=_EPSILON,
        )

    @property
    def best(self) -> Judgement:
        return min(self.curve, key=lambda one: (not math.isfinite(one.held_out), one.held_out))

    def train(self, progress: Callable[[int, Judgement], None]) -> list[Tensor]:
        """Makes the steps; returns the values of the student at the best judgement.

        Ctrl-C ends it after the step that runs.

        Args:
            progress: Called after each judgement, with the number of steps.
        """
        options, kept = self._options, self._student.values()
        with torch.enable_grad(), self._reader.watching(), Interruption() as interruption:
            self._judge(progress)
            places = {round(options.steps * (n + 1) / options.judgements) for n in range(options.judgements)}
            while self.steps < options.steps:
                finite, asked = self._step(interruption)
                if not finite:
                    self.ended = f"{_NOT_FINITE} in step {self.steps}"
                    return kept
                if asked or self.steps in places:
                    self._judge(progress)
                    kept = self._student.values() if self.best is self.curve[-1] else kept
                if asked:
                    self.ended = f"interrupted after {self.steps} of {options.steps} steps"
                    return kept
                if len(self.curve) - 1 - self.curve.index(self.best) >= options.patience:
                    self.ended = f"no better in {options.patience} judgements, so that {self.steps} steps were made"
                    return kept
        return kept

    def _step(self, interruption: Interruption) -> tuple[bool, bool]:
        """Returns whether all was finite, and whether Ctrl-C was pressed on any rank."""
        self._optimizer.zero_grad(set_to_none=True)
        divergence, count = 0.0, 0
        for lesson in self._of_a_step():
            divergence += self._learn(lesson)
            count += len(lesson.top)
        parameters = [*self._student.ratios, *self._student.masters]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        told = torch.tensor([divergence, float(interruption.asked)], device=self._device)
        flat = torch.cat([*(part.flatten() for part in parts), told])
        total = distributed.sum_(flat, count)
        *gradients, told = flat.split([*(p.numel() for p in parameters), 2])
        finite = bool(torch.isfinite(flat).all())
        divergence, asked = told.tolist()
        if finite and total:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.view_as(parameter) / total
            for group in self._optimizer.param_groups:
                group["lr"] = group["peak"] * _share_of_peak(self.steps, self._options.steps)
            self._optimizer.step()
            self._student.show()
        self.steps += 1
        self.tokens += total
        self._since = (self._since[0] + divergence, self._since[1] + total)
        return finite, asked > 0

    def _of_a_step(self) -> Iterator[Lesson]:
        """This rank's lessons of the next step: as many as have its share of the tokens, one at least."""
        wanted = self._options.tokens_per_step / distributed.world_size()
        count = 0
        while self._lessons and count < wanted:
            if not self._waiting:
                order = torch.randperm(len(self._lessons), generator=self._generator, device="cpu")
                self._waiting = [self._lessons[number] for number in order.tolist()]
            lesson = self._waiting.pop()
            count += len(lesson.top)
            yield lesson

    def _learn(self, lesson: Lesson) -> float:
        """Adds the gradients of a lesson; returns its divergence, summed over positions."""
        try:
            return self._backward(lesson)
        except torch.OutOfMemoryError:
            if self._options.checkpoint_activations is not None or self._reruns:
                raise
            self._rerun("there was no room")
        return self._backward(lesson)

    def _backward(self, lesson: Lesson) -> float:
        with self._student.taking_gradients():
            divergence = self._forward(lesson)
            divergence.backward()  # type: ignore[no-untyped-call]
        peak = peak_bytes(self._device)
        if peak is not None and self._memory is not None and peak > self._memory and not self._reruns:
            self._rerun(f"{peak / 2**20:.0f} MiB were in use, and {self._memory / 2**20:.0f} are allowed")
        return float(divergence.detach())

    def _rerun(self, why: str) -> None:
        if self._options.checkpoint_activations is None:
            log.info("finish: activations are computed twice from here on: %s on %s", why, self._device)
            self._reruns = True
            give_back(self._device)
            Peak(self._device)

    def over_memory(self) -> list[str]:
        """Sentences if any rank's device had to hold more than is allowed. Collective."""
        peak, allowed, told = peak_bytes(self._device), self._memory, None
        if peak is not None and allowed is not None and peak > allowed:
            sizes = f"{peak / 2**20:.0f} MiB on {self._device} at the peak, where {allowed / 2**20:.0f} were allowed"
            told = f"finish: {sizes}"
        return [one for one in dict.fromkeys(distributed.gather_objects(told)) if one is not None]

    def _forward(self, lesson: Lesson) -> Tensor:
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(0)
            if self._reruns:
                with checkpointed(self._model):
                    return self._divergence(lesson)
            return self._divergence(lesson)

    def _divergence(self, lesson: Lesson) -> Tensor:
        logits = lesson.counted(self._read(lesson))
        found: Tensor = TopDivergence.apply(logits, lesson.top.to(self._device))
        return found

    def _read(self, lesson: Lesson) -> Tensor:
        what, untrained = "a batch of the finish", self.steps == 0  # later ones may be the learning rate's doing
        return self._reader.read(lambda: self._run(self._model, lesson.data), what, finite=untrained)

    @torch.no_grad()
    def _judge(self, progress: Callable[[int, Judgement], None]) -> None:
        sums = {}
        for number, lesson in self._held_out.items():
            with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                torch.manual_seed(0)
                logits = lesson.counted(self._read(lesson))
            sums[number] = (lesson.top.to(self._device).divergence(logits), len(lesson.top))
        of_all: dict[int, tuple[float, int]] = {}
        for of_rank in distributed.gather_objects(sums):
            of_all |= of_rank
        tokens = sum(count for _, count in of_all.values())
        held_out = math.fsum(value for value, _ in of_all.values()) / max(1, tokens)
        divergence, trained = self._since
        self.curve.append(Judgement(self.steps, divergence / trained if trained else math.nan, held_out))
        self._since = (0.0, 0)
        progress(self.steps, self.curve[-1])


def _share_of_peak(step: int, steps: int) -> float:
    """Of the learning rate: a linear warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
