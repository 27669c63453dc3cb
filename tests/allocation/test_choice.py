"""Which options are chosen: those of all choices within the budget that do the least damage."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_plugin.allocation import choice
from gptq_plugin.allocation.choice import Choices, Option

OPTIONS = st.lists(
    st.builds(Option, st.integers(0, 60), st.floats(0, 1, width=32)), min_size=1, max_size=4
)  # costs share no divisor
UNITS = st.lists(OPTIONS, min_size=1, max_size=5)


def cost(units, chosen):
    return sum(options[place].cost for options, place in zip(units, chosen, strict=True))


def damage(units, chosen):
    return math.fsum(options[place].damage for options, place in zip(units, chosen, strict=True))


def every(units):
    return itertools.product(*(range(len(options)) for options in units))


@settings(deadline=None, max_examples=200)
@given(UNITS, st.integers(0, 320))
def test_no_other_choice_within_the_budget_does_less_damage(units, budget):
    choices = Choices(units)
    if budget < choices.least:
        with pytest.raises(ValueError, match="cheapest choice"):
            choices.within(budget)
        return
    chosen = choices.within(budget)
    best = min(damage(units, one) for one in every(units) if cost(units, one) <= budget)
    assert cost(units, chosen) <= budget
    assert damage(units, chosen) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("cells", [2**16, 50])
def test_a_larger_budget_never_does_more_damage_and_none_is_exceeded(monkeypatch, cells):
    monkeypatch.setattr(choice, "_MOST_CELLS", cells)  # 50 steps round the costs up
    draw = random.Random(0)
    units = [
        [Option(draw.randrange(10**6, 10**7), draw.random()) for _ in range(draw.randrange(1, 5))] for _ in range(12)
    ]
    choices, damages = Choices(units), []
    for share in range(101):
        budget = choices.least + (choices.most - choices.least) * share // 100
        chosen = choices.within(budget)
        assert cost(units, chosen) <= budget
        damages.append(damage(units, chosen))
    assert damages == sorted(damages, reverse=True) and damages[0] > damages[-1]
    if cells > 50:
        best = [min(options, key=lambda option: option.damage).damage for options in units]
        assert damages[-1] == pytest.approx(math.fsum(best))


def test_of_equally_good_options_the_cheaper_is_taken():
    units = [[Option(8, 0.5), Option(4, 0.5)], [Option(4, 0.0), Option(2, 0.0), Option(2, 0.25)]]
    assert Choices(units).within(100) == [1, 1]


def test_rounded_costs_leave_little_of_the_budget_unused():
    draw = random.Random(1)
    units = [[Option(size * bits + 1, 4.0**-bits * draw.random()) for bits in (2, 3, 4, 8)]
             for size in draw.choices(range(10**6, 10**7), k=200)]  # fmt: skip
    choices = Choices(units)
    budget = (choices.least + choices.most) // 3
    spent = cost(units, choices.within(budget))
    assert (
        budget - 200 * (choices.most - choices.least) / 2**16 - max(o.cost for u in units for o in u) < spent <= budget
    )
