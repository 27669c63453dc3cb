"""Steps of an optimizer and judgements between them, of which the best is kept: `Descent`."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.device.memory import with_index
from gptq_plugin.finish.interruption import Interruption
from gptq_plugin.finish.student import Student
from gptq_plugin.report.finish_record import Judgement

_BETAS, _EPSILON, _WARM_UP = (0.9, 0.95), 1e-14, 0.05


@dataclass(frozen=True)
class Pace:
    """How long a descent goes on; see the fields of `Finish`."""

    steps: int
    tokens_per_step: int
    judgements: int
    patience: int
    seed: int


class Descent(abc.ABC):
    """Trains a student, and keeps what the held-out samples tell is best. In a process group every rank makes its own
    descent, on its own samples; gradients are added up, and all have the same bytes in the end.

    Args:
        student: What is trained.
        rates: Its parameters, all of them, with the peaks of their learning rates.
        counts: Positions in each of this rank's batches to train on; those without any are left out.
        pace: How long.
        device: Where the model is.

    Attributes:
        curve: The judgements so far.
        steps: Steps so far.
        tokens: Positions trained on so far, over all ranks.
        best: The best judgement; that of step 0 is what the student began with.
        ended: Why the training ended.
        interrupted: Whether that was Ctrl-C.
    """

    def __init__(
        self,
        student: Student,
        rates: Sequence[tuple[Sequence[nn.Parameter], float]],
        counts: Sequence[int],
        pace: Pace,
        device: torch.device,
    ) -> None:
        self._student, self._pace, self._device = student, pace, device
        self._counts = {number: count for number, count in enumerate(counts) if count}
        self._waiting: list[int] = []  # batches of this epoch
        self._generator = torch.Generator("cpu").manual_seed(pace.seed)
        self._since = (0.0, 0)  # loss and positions trained on since the last judgement
        self.curve: list[Judgement] = []
        self.steps = self.tokens = 0
        self.ended = f"all {pace.steps} steps were made"
        self.interrupted = False
        parameters = student.parameters
        sizes = [one.numel() for one in parameters]
        # Of all parameters, one behind the other, with a step's loss and whether Ctrl-C was pressed behind them.
        self._sums = torch.zeros(sum(sizes) + 2, device=device)
        for parameter, gradient in zip(parameters, self._sums[:-2].split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        groups = [{"params": list(some), "peak": peak} for some, peak in rates if some]
        self._optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON, fused=device.type == "cuda")

    @property
    def best(self) -> Judgement:
        return min(self.curve, key=lambda one: (not math.isfinite(one.held_out), one.held_out))

    def train(self, progress: Callable[[int, Judgement], None], interruption: Interruption) -> list[Tensor]:
        """Makes the steps; returns the values of the student at the best judgement.

        Args:
            progress: Called after each judgement, with the number of steps.
            interruption: Ctrl-C ends the training after the step that runs.
        """
        pace, kept = self._pace, self._student.values()
        with torch.enable_grad(), apart_from_other_numbers(self._device):
            self._judge(progress)
            places = {round(pace.steps * (n + 1) / pace.judgements) for n in range(pace.judgements)}
            while self.steps < pace.steps:
                finite, self.interrupted = self._step(interruption)
                if not finite:
                    self.ended = f"the {self.what} is not finite in step {self.steps}"
                    return kept
                if self.interrupted or self.steps in places:
                    self._judge(progress)
                    kept = self._student.values() if self.best is self.curve[-1] else kept
                if self.interrupted:
                    self.ended = f"interrupted after {self.steps} of {pace.steps} steps"
                    return kept
                if len(self.curve) - 1 - self.curve.index(self.best) >= pace.patience:
                    self.ended = f"no better in {pace.patience} judgements, so that {self.steps} steps were made"
                    return kept
        return kept

    what = "loss"  # in words

    @abc.abstractmethod
    def _learn(self, number: int) -> Tensor:
        """Adds the gradients of a batch; returns its loss, summed over positions, on the device."""

    @abc.abstractmethod
    def _measure(self) -> Mapping[int, tuple[float, int]]:
        """The loss of each of this rank's held-out batches, by its number over all ranks, summed over positions; and
        these."""

    def _step(self, interruption: Interruption) -> tuple[bool, bool]:
        """Returns whether all was finite, and whether Ctrl-C was pressed on any rank."""
        self._sums.zero_()
        losses, count = torch.zeros((), dtype=torch.float64, device=self._device), 0
        for number in self._of_a_step():
            losses += self._learn(number)
            count += self._counts[number]
        loss_and_asked = self._sums[-2:]
        loss_and_asked[0] = losses
        loss_and_asked[1] = float(interruption.asked)
        total = distributed.sum_(self._sums, count)
        finite, loss, asked = torch.cat([torch.isfinite(self._sums).all()[None], loss_and_asked]).tolist()
        if finite and total:
            self._sums.div_(total)
            for group in self._optimizer.param_groups:
                group["lr"] = group["peak"] * _share_of_peak(self.steps, self._pace.steps)
            self._optimizer.step()
            self._student.show()
        self.steps += 1
        self.tokens += total
        self._since = (self._since[0] + loss, self._since[1] + total)
        return bool(finite), asked > 0

    def _of_a_step(self) -> Iterator[int]:
        """This rank's batches of the next step: as many as have its share of the tokens, one at least."""
        wanted = self._pace.tokens_per_step / distributed.world_size()
        count, own = 0, list(self._counts)
        while own and count < wanted:
            if not self._waiting:
                order = torch.randperm(len(own), generator=self._generator, device="cpu")
                self._waiting = [own[place] for place in order.tolist()]
            number = self._waiting.pop()
            count += self._counts[number]
            yield number

    @torch.no_grad()
    def _judge(self, progress: Callable[[int, Judgement], None]) -> None:
        held_out = mean_over_ranks(self._measure())
        loss, trained = self._since
        self.curve.append(Judgement(self.steps, loss / trained if trained else math.nan, held_out))
        self._since = (0.0, 0)
        progress(self.steps, self.curve[-1])


def mean_over_ranks(sums: Mapping[int, tuple[float, int]]) -> float:
    """The mean over positions of batches' sums, each with its positions, by the batches' numbers over all ranks: the
    same on every rank, and for any number of them."""
    of_all: dict[int, tuple[float, int]] = {}
    for of_rank in distributed.gather_objects(sums):
        of_all |= of_rank
    positions = sum(count for _, count in of_all.values())
    return math.fsum(value for value, _ in of_all.values()) / max(1, positions)


@contextlib.contextmanager
def apart_from_other_numbers(device: torch.device) -> Iterator[None]:
    """Has what is drawn at random inside the block change nothing of what is drawn behind it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def draw_as_before(device: torch.device) -> None:
    """Has what a forward draws at random from here on be the same each time, in `apart_from_other_numbers`."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[with_index(device).index].manual_seed(0)


def _share_of_peak(step: int, steps: int) -> float:
    """Of the learning rate: a linear warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / (_WARM_UP * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
