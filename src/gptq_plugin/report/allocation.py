"""What `target_bits` chose, and why: `Allocation`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gptq_plugin.report.numbers import format_bits_per_weight, format_value


@dataclass(frozen=True)
class UnitChoice:
    """Layers that got one grid together.

    Attributes:
        name: Of the layer, or the one under which servers compute these layers.
        layers: Number of layers.
        weights: Number of their weights.
        bits: Width that was chosen.
        group_size: Groups that were chosen.
        divergence: KL(float || these layers quantized alone) at the grid that was chosen, mean over positions, in nats;
            scaled from a measured one if that grid was not.
        measured: The divergences that were measured, by width, in the largest groups.
    """

    name: str
    layers: int
    weights: int
    bits: int
    group_size: int
    divergence: float
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """The choice of grids within a budget.

    Attributes:
        target_bits: The budget, in bits per weight with scales and zeros.
        bits: What the choice takes.
        tokens: Positions on which divergences were measured.
        seconds: Time it took.
        units: The units, in the order of the layers.
    """

    target_bits: float
    bits: float
    tokens: int
    seconds: float
    units: Sequence[UnitChoice]

    @property
    def widths(self) -> dict[int, float]:
        """Share of the units' weights by width."""
        weights = sum(unit.weights for unit in self.units)
        found = dict.fromkeys(sorted({unit.bits for unit in self.units}), 0.0)
        for unit in self.units:
            found[unit.bits] += unit.weights / weights
        return found

    def summary(self) -> str:
        """The result in a sentence."""
        shares = ", ".join(f"{share:.0%} of the weights at {bits} bits" for bits, share in self.widths.items())
        total = math.fsum(unit.divergence for unit in self.units)
        return (
            f"target_bits={self.target_bits:g}: {format_bits_per_weight(self.bits)}, {shares}; what layers do alone "
            f"adds up to {total:.3g} nats on {self.tokens} held-out positions"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of a table: a head, and a row for each unit."""
        widths = sorted({width for unit in self.units for width in unit.measured}, key=int)
        head = ("layers", "number", "bits", "group", "KL", *(f"KL at {width}" for width in widths))
        rows = [
            (
                unit.name,
                str(unit.layers),
                str(unit.bits),
                str(unit.group_size),
                format_value(unit.divergence),
                *(format_value(unit.measured[width]) if width in unit.measured else "" for width in widths),
            )
            for unit in self.units
        ]
        return [head, *rows]
