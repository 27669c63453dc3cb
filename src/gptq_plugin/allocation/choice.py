"""Chooses one option for each of many units so that their damages add up to the least within a budget: `Choices`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_CELLS = 2**16  # steps of cost between the cheapest choice of all and the dearest


@dataclass(frozen=True)
class Option:
    """Attributes: cost: In bytes. damage: What the choice does to the model, added up over units."""

    cost: int
    damage: float


class Choices:
    """The best choices of one option a unit for every budget: the multiple-choice knapsack, by dynamic programming.

    Costs count in steps of their greatest common divisor, for which the choice is exact. Where that gives more than
    65,536 steps, costs are rounded up to whole steps of a 65,536th, so that a choice may leave as much of the budget
    unused for each unit, and never exceeds it. The steps do not depend on the budget: more never does more damage.

    Args:
        units: The options of every unit, at least one each.
    """

    def __init__(self, units: Sequence[Sequence[Option]]) -> None:
        self._least = [min(option.cost for option in options) for options in units]
        most = [max(option.cost for option in options) for options in units]
        self.least, self.most = sum(self._least), sum(most)
        above = [[option.cost - least for option in options] for options, least in zip(units, self._least, strict=True)]
        exact = math.gcd(*(cost for costs in above for cost in costs)) or 1
        self._step = exact * max(1, -(-(self.most - self.least) // (exact * _MOST_CELLS)))
        self._steps = [[-(-cost // self._step) for cost in costs] for costs in above]
        self._taken: list[Tensor] = []  # by unit, the option taken with so many steps at most
        cells = sum(map(max, self._steps)) + 1
        damage = torch.zeros(cells, dtype=torch.float64, device="cpu")
        for options, steps in zip(units, self._steps, strict=True):
            damage, taken = _with_unit(damage, options, steps)
            self._taken.append(taken)

    def within(self, budget: int) -> list[int]:
        """The option of every unit, with the least damage among all choices that cost at most the budget.

        Raises:
            ValueError: Even the cheapest choice costs more.
        """
        if budget < self.least:
            raise ValueError(f"the cheapest choice costs {self.least}, more than {budget}")
        left = min((budget - self.least) // self._step, len(self._taken[0]) - 1) if self._taken else 0
        chosen = []
        for taken, steps in zip(reversed(self._taken), reversed(self._steps), strict=True):
            chosen.append(int(taken[left]))
            left -= steps[chosen[-1]]
        return chosen[::-1]


def _with_unit(damage: Tensor, options: Sequence[Option], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The least damage with at most so many steps, and the option taken for it, once a unit is added.

    Of options that are equally good the cheaper is taken.
    """
    best = torch.full_like(damage, math.inf)
    taken = torch.zeros(len(damage), dtype=torch.int16, device="cpu")
    for number in sorted(range(len(options)), key=lambda one: (steps[one], options[one].damage)):
        start = steps[number]
        with_it = damage[: len(damage) - start] + options[number].damage
        better = with_it < best[start:]
        best[start:] = torch.where(better, with_it, best[start:])
        taken[start:] = torch.where(better, torch.full_like(taken[start:], number), taken[start:])
    return best, taken
