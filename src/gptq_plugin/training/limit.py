"""`Limit`: how far one metric may move.

Tested by tests/training/test_quality_gate.py: with the gate that it is of.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gptq_plugin.options import fields
from gptq_plugin.training.paired import Draws, Measured, unpaired

_CONFIDENT = re.compile(r"(.+?)\s+at\s+([\d.]+)\s*%\s*")


@dataclass(frozen=True)
class Limit:
    """How far one metric may move in its worse direction.

    Attributes:
        amount: Largest change that is still good; its sign is that of the worse direction.
        relative: True if it is a share of the float model's value.
        confidence: How sure it has to be that the change is no larger, between 0.5 and 1; None judges the change
            itself.
    """

    amount: float
    relative: bool
    confidence: float | None = None

    @classmethod
    def parse(cls, metric: str, value: Any) -> Limit:
        """Reads 0.02 (absolute: the metric may rise by that), -0.01 (may fall), "2%", "-1%" (relative), and each with a
        confidence from 50 to 99 %: "2% at 95%".

        Raises:
            ValueError: The value is zero, not finite, or neither a number nor a percentage; or the confidence is out of
                range.
        """
        match = _CONFIDENT.fullmatch(value) if isinstance(value, str) else None
        change = match[1] if match else value
        relative = isinstance(change, str) and change.strip().endswith("%")
        try:
            amount = float(change.strip().removesuffix("%")) / 100 if relative else float(change)
            confidence = float(match[2]) / 100 if match else None
        except Exception:  # noqa: BLE001  any object of a user
            amount, confidence = math.nan, None
        is_amount = math.isfinite(amount) and amount != 0 and not isinstance(value, bool)
        if not is_amount or not (confidence is None or 0.5 <= confidence <= 0.99):
            raise ValueError(
                f"max_degradation[{fields.shown(metric)}] must be a number or a percentage other than zero, such as "
                "0.02 or '2%' for a metric that may rise by so much, -0.01 for one that may fall, and '2% at 95%' to "
                f"be so sure of it (50 to 99 %); got {fields.shown(value)}"
            )
        return cls(amount, relative, confidence)

    def excess(self, before: float, after: float) -> float:
        """How much worse the change is than allowed: at most 0 if it is good, infinite if a value is NaN, or if there
        is no confidence to be had (`paired.unpaired`)."""
        excess = float(self._excess(before, after))
        if self.confidence is not None and math.isfinite(excess):
            draws = _draws(before, after)
            if draws is None:
                return math.inf
            excess = draws.bound(self._excess, self.confidence)
        return math.inf if math.isnan(excess) else excess

    def described(self, before: float, after: float) -> str:
        """The change, and what is allowed of it."""
        allowed = f"{self.amount:+.3%}" if self.relative else f"{self.amount:+.5g}"
        change = f"{after - before:+.5g}" + (f", {(after - before) / abs(before):+.3%}" if before else "")
        if self.confidence is None:
            return f"{change}; {allowed} allowed"
        why = unpaired(before, after)
        if why:
            return f"{change}; {allowed} allowed at {self.confidence:.4g}, which cannot be judged: {why}"
        bound = math.copysign(1, self.amount) * (self.excess(before, after) + self._allowed(before))
        shown = f"{bound / abs(before):+.3%}" if self.relative and before else f"{bound:+.5g}"
        return f"{change}, at {100 * self.confidence:.4g}% confidence up to {shown}; {allowed} allowed"

    def _allowed(self, before: Any) -> Any:
        return abs(self.amount) * (abs(before) if self.relative else 1)

    def _excess(self, before: float | Tensor, after: float | Tensor) -> Any:
        return math.copysign(1, self.amount) * (after - before) - self._allowed(before)


def _draws(before: float, after: float) -> Draws | None:
    if unpaired(before, after):
        return None
    assert isinstance(before, Measured) and isinstance(after, Measured)
    return Draws.of(before, after)
