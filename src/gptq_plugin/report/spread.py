"""How well a metric's change is known: `Spread`.

Tested by tests/report/test_figures.py: with the figures that show it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The central 95 % interval of a metric's change from float to quantized.

    Attributes:
        low, high: Of the change.
        relative_low, relative_high: Of the change as a fraction of the float value's size; NaN if that may be 0.
        parts: Number of samples or batches that were drawn.
        unit: Which of them, "samples" or "batches".
        why: Why not samples, in words; empty if they are.
    """

    low: float
    high: float
    relative_low: float
    relative_high: float
    parts: int
    unit: str = "samples"
    why: str = ""

    @property
    def over(self) -> str:
        """What was drawn, in words."""
        return f"{self.parts} {self.unit}" + (f", because {self.why}" if self.why else "")

    @property
    def margin(self) -> float:
        """Half the interval's width: the change is known to so much."""
        return (self.high - self.low) / 2

    @property
    def relative_margin(self) -> float:
        return (self.relative_high - self.relative_low) / 2
