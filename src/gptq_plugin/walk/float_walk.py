"""Which of two walks a thread serves: that of the float model, or that of the model quantized so far.

With an asymmetric target every batch has two forwards. They take turns at every layer, as any two batches do; layers
that are quantized run with the weights of the walk they are called in.

Tested by tests/walk/test_lockstep.py: with the forwards that take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from gptq_plugin.walk.batch_thread import Forward

_running: ContextVar[tuple[int, bool] | None] = ContextVar("batch, and if it is the float model's", default=None)


def running_batch() -> int | None:
    """Number of the batch whose forward is on this thread, in either of two walks; None elsewhere."""
    running = _running.get()
    return None if running is None else running[0]


def serves_float() -> bool:
    """True on the thread of a forward of the float model."""
    running = _running.get()
    return running is not None and running[1]


def running_as(forward: Forward, batch: int, is_float: bool) -> Forward:
    """The forward of a batch, in the walk of the float model or in the other one."""

    def run() -> Any:
        _running.set((batch, is_float))  # for this thread, whose context is its own
        return forward()

    return run


@dataclass(frozen=True)
class Walks:
    """The forwards that take turns: one a batch, or two, of which the float one comes just before the other.

    Float forwards make no layer ready, and nothing waits for them: they only wait, where their input is compared.

    Attributes:
        compared: Names of the layers whose inputs in both walks are compared; none for one walk.
    """

    compared: frozenset[str] = frozenset()

    @property
    def two(self) -> bool:
        """True if every batch has two forwards; else one, with the batch's number."""
        return bool(self.compared)

    def forwards(self, batches: int, forward: Callable[[int, int], Forward]) -> list[Forward]:
        """All forwards by number, made as forward(batch, number)."""
        numbers = range(batches * (1 + self.two))
        made = [(forward(self.batch(number), number), number) for number in numbers]
        return [running_as(one, self.batch(number), self.is_float(number)) for one, number in made]

    def batch(self, number: int) -> int:
        """The batch of a forward."""
        return number // 2 if self.two else number

    def is_float(self, number: int) -> bool:
        """True for a forward of the float model."""
        return self.two and number % 2 == 0

    def passes(self, number: int, layer: str) -> bool:
        """True if a forward goes through the layer as if it were none of those to quantize."""
        return self.is_float(number) and layer not in self.compared


ONE_WALK = Walks()
