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

_serves_float: ContextVar[bool] = ContextVar("the forward on this thread is the float model's", default=False)


def serves_float() -> bool:
    """True on the thread of a forward of the float model."""
    return _serves_float.get()


def in_float(forward: Forward) -> Forward:
    """The forward, in the walk of the float model."""

    def run() -> Any:
        _serves_float.set(True)  # for this thread, whose context is its own
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
        made = [forward(self.batch(number), number) for number in range(batches * (1 + self.two))]
        return [in_float(one) if self.is_float(number) else one for number, one in enumerate(made)]

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
