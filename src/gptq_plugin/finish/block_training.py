"""The training of one block by its float outputs: `BlockTraining`.

Tested by tests/finish/test_block_walk.py: with the walk over all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.finish.chain import Call
from gptq_plugin.finish.descent import Descent, Pace, draw_as_before
from gptq_plugin.finish.interruption import Interruption
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.recorder import Gradients, Recorder
from gptq_plugin.finish.student import Student
from gptq_plugin.report.finish_record import Judgement


@dataclass(frozen=True)
class Task:
    """A batch at a block.

    Attributes:
        call: The block's.
        hidden: Its input, which went through the trained blocks before it.
        wanted: What the float block gives for the float input.
        before: That input.
        counted: See `Passage`.
        positions: Number of positions that count.
    """

    call: Call
    hidden: Tensor
    wanted: Tensor
    before: Tensor
    counted: Tensor | None
    positions: int

    def squares(self, values: Tensor) -> Tensor:
        """The sum of squares of the difference from `wanted`, over positions that count."""
        counted = None if self.counted is None else self.counted.to(values.device)
        return _squares(values, self.wanted.to(values.device), counted)

    def output(self, block: nn.Module, device: torch.device) -> Tensor:
        """What a block gives for `hidden`."""
        return self.run(block, self.hidden, device)

    def run(self, block: nn.Module, hidden: Tensor, device: torch.device) -> Tensor:
        """What a block gives for an input."""
        draw_as_before(device)
        return self.call.run(block, hidden.to(device))


class BlockTraining(Descent):
    """Trains a block's student by the squared error of outputs, as a share of what the float block changes.

    Args:
        block: With the student in it, on the device.
        student: What is trained.
        tasks: To train on.
        held_out: To judge on, by their numbers over all ranks.
        options: How.
        device: Where the block is.
        memory: Bytes of it that may be used; None is all.
    """

    what = "error of a block"

    def __init__(
        self,
        block: nn.Module,
        student: Student,
        tasks: Sequence[Task],
        held_out: dict[int, Task],
        options: Finish,
        device: torch.device,
        memory: int | None = None,
    ) -> None:
        patience = options.patience_with(codes=bool(student.latent))
        pace = Pace(options.block_steps, options.tokens_per_step, options.judgements, patience, options.seed)
        super().__init__(
            student, student.with_rates(options.rates_in_blocks), [one.positions for one in tasks], pace, device
        )
        self._block, self._tasks, self._held_out = block, tasks, held_out
        self._unit = _unit([*tasks, *held_out.values()], device)
        draw = partial(draw_as_before, device)
        self._recorder = Recorder(self._gradients_of, block, draw, device, memory, "a step of a block")

    def train(self, progress: Callable[[int, Judgement], None], interruption: Interruption) -> list[Tensor]:
        try:
            return super().train(progress, interruption)
        finally:
            self._recorder.forget()

    def _learn(self, number: int) -> Tensor:
        task = self._tasks[number]
        counted = None if task.counted is None else task.counted.to(self._device)
        batch = (task.call, task.hidden.to(self._device), task.wanted.to(self._device), counted)
        error, gradients = self._recorder(batch)
        self._student.add(gradients)
        return error

    def _gradients_of(self, batch: tuple[Call, Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Gradients]:
        call, hidden, wanted, counted = batch
        error = _squares(call.run(self._block, hidden), wanted, counted) / self._unit
        return error.detach(), self._student.gradients_of(error)

    def _measure(self) -> dict[int, tuple[float, int]]:
        return {number: (float(self._error(task)), task.positions) for number, task in self._held_out.items()}

    def _error(self, task: Task) -> Tensor:
        return task.squares(task.output(self._block, self._device)) / self._unit


def _squares(values: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    apart = (values.float() - wanted.float()).flatten(0, -2)
    return (apart if counted is None else apart.masked_fill(~counted[:, None], 0.0)).square().sum()


def _unit(tasks: Sequence[Task], device: torch.device) -> float:
    """The mean over positions, of all ranks, of the squared change that the float block makes."""
    squares = [float(task.squares(task.before.to(device))) for task in tasks]
    own = (sum(squares), sum(task.positions for task in tasks))
    sums = distributed.gather_objects(own)
    mean: float = sum(one for one, _ in sums) / max(1, sum(count for _, count in sums))
    return mean if mean > 0 else 1.0
