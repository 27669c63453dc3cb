"""A budget of bytes for the layers of a plan: what fits, what is fixed, and a plan of its size before any measurement.

Refusals are tested with the quantizer: tests/quantize/test_allocate.py.
"""

from __future__ import annotations

import itertools

import pytest
from plans import plan_of

from gptq_plugin import QuantizeConfig
from gptq_plugin.allocation.budget import Budget, check_budget
from gptq_plugin.allocation.grids import Grid, average_bits, with_grids

from models import tiny_llama

FIXED = {".*down_proj": {"bits": 8, "group_size": 32}}


def budget_of(target_bits=4.0, **options):
    return Budget.of(plan_of(tiny_llama(), QuantizeConfig(group_size=32, target_bits=target_bits, **options)), None)


@pytest.mark.parametrize("options", [{}, {"dynamic": FIXED}, {"sym": False}, {"checkpoint_format": "gptq_v2"}])
def test_a_choice_takes_no_more_than_the_budget_and_as_much_as_fits(options):
    budget = budget_of(4.7, **options)
    damages = {unit.name: {grid: 4.0**-grid.bits for grid in unit.grids} for unit in budget.units}
    grids = budget.chosen(damages)
    targets = budget.plan.targets
    average = average_bits(targets, grids)
    largest = max(unit.bytes_on(grid) for unit in budget.units for grid in unit.grids)
    weights = sum(target.weight.numel() for target in targets)
    assert 4.7 - 8 * largest / weights < average <= 4.7
    planned = with_grids(budget.plan, grids)
    assert {t.name: Grid.of(t.config) for t in planned.targets} == grids and planned.config.target_bits is None


def test_fixed_layers_are_none_of_the_units_and_leave_less_for_them():
    free, fixed = budget_of(), budget_of(dynamic=FIXED)
    assert not any("down_proj" in unit.name for unit in fixed.units) and len(fixed.units) == len(free.units) - 2
    taken = sum(Grid(8, 32).bytes_of(t) for t in fixed.plan.targets if t.name.endswith("down_proj"))
    assert fixed.bytes == free.bytes - taken


def test_a_layer_that_is_stored_in_several_places_counts_in_each():
    config, model = QuantizeConfig(group_size=32, target_bits=4.0), tiny_llama(num_hidden_layers=3)
    whole = Budget.of(plan_of(model, config), None)
    model.model.layers[2] = model.model.layers[0]
    budget = Budget.of(plan_of(model, config), None)
    assert budget.bytes == whole.bytes and len(budget.units) == len(whole.units) * 2 / 3
    first, second = (next(unit for unit in budget.units if f".{block}.mlp.up" in unit.name) for block in (0, 1))
    assert first.bytes_on(Grid(4, 32)) == 2 * second.bytes_on(Grid(4, 32))


def test_no_other_choice_within_does_less_damage():
    """Against all choices for one block, with damages of no order."""
    plan = plan_of(tiny_llama(num_hidden_layers=1), QuantizeConfig(group_size=32, target_bits=4.0))
    budget = Budget.of(plan, None)
    damages = {unit.name: {grid: (7 * n + 3 * m) % 11 + 1.0 for m, grid in enumerate(unit.grids)}
               for n, unit in enumerate(budget.units)}  # fmt: skip
    grids = budget.chosen(damages)
    found = sum(damages[unit.name][grids[unit.names[0]]] for unit in budget.units)
    every = itertools.product(*(unit.grids for unit in budget.units))
    within = (c for c in every if sum(u.bytes_on(g) for u, g in zip(budget.units, c, strict=True)) <= budget.bytes)
    best = min(sum(damages[u.name][g] for u, g in zip(budget.units, c, strict=True)) for c in within)
    assert found == best


def test_a_provisional_plan_has_the_size_of_the_budget():
    plan = plan_of(tiny_llama(), QuantizeConfig(group_size=32, target_bits=4.0))
    provisional = check_budget(plan, None)
    grids = {target.name: Grid.of(target.config) for target in provisional.targets}
    assert 3.5 < average_bits(plan.targets, grids) <= 4.0
    unasked = plan_of(tiny_llama(), QuantizeConfig(group_size=32))
    assert check_budget(unasked, None) is unasked
