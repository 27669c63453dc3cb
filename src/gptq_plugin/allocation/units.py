"""Layers that get one grid together, and the grids that they can have: `Unit`, `units_of`."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptq_plugin.allocation.grids import Grid
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import problems
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import ExportError, some
from gptq_plugin.kernels.reference import BITS
from gptq_plugin.model.experts import experts_of
from gptq_plugin.model.fused_names import fused_name
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target, unpackable

GROUP_SIZES = (128, 64, 32)  # clients have fast kernels for these


@dataclass(frozen=True)
class Unit:
    """Layers that get one grid: a single one, or those that servers compute as one.

    Attributes:
        name: Its layer's, or the name that servers give its layers together.
        targets: The layers.
        grids: The grids that all of them can have, narrow ones and large groups first.
    """

    name: str
    targets: tuple[Target, ...]
    grids: tuple[Grid, ...]

    @property
    def names(self) -> list[str]:
        return [target.name for target in self.targets]

    def bytes_on(self, grid: Grid) -> int:
        """Bytes that the layers' weights take on a grid."""
        return sum(grid.bytes_of(target) for target in self.targets)


def is_fixed(target: Target, config: QuantizeConfig) -> bool:
    """True for a layer whose `dynamic` rule sets its width or groups."""
    return not {"bits", "group_size"}.isdisjoint(config.rule_for(target.name)[1])


def units_of(plan: Plan, client: Client | None) -> list[Unit]:
    """The units of a plan's layers, but for those whose `dynamic` rules fix their grids.

    q, k and v are one unit, gate and up too, and all layers of a block of experts, whatever the client: so one that
    fuses them reads the checkpoint as well.

    Args:
        plan: The layers.
        client: Has to read each grid; None is any.

    Raises:
        ExportError: The client takes none of the grids of a unit; with its reasons.
    """
    together: dict[str, list[Target]] = defaultdict(list)
    for target in plan.targets:
        if not is_fixed(target, plan.config):
            together[_unit_name(target)].append(target)
    inventory = Inventory.of_plan(plan) if client is not None else None
    return [
        Unit(name if len(targets) > 1 else targets[0].name, tuple(targets), _grids(targets, inventory, client, plan))
        for name, targets in together.items()
    ]


def _unit_name(target: Target) -> str:
    return experts_of(target.name, target.module) or fused_name(target.name) or target.name


def _grids(
    targets: Sequence[Target], inventory: Inventory | None, client: Client | None, plan: Plan
) -> tuple[Grid, ...]:
    possible = list(_possible(targets, plan.config.group_size))
    if inventory is None or client is None:
        return tuple(possible)
    refused = {grid: problems(_inventory_of(targets, grid, inventory), client) for grid in possible}
    taken = tuple(grid for grid, reasons in refused.items() if not reasons)
    if not taken:
        reasons = dict.fromkeys(reason for of_grid in refused.values() for reason in of_grid)
        raise ExportError(
            f"{client} takes {some([target.name for target in targets])} on no grid that target_bits could give:\n  "
            + "\n  ".join(reasons)
        )
    return taken


def _possible(targets: Sequence[Target], largest: int) -> Iterator[Grid]:
    """Grids on which all layers can be stored, in groups of the largest size or smaller ones."""
    sizes = dict.fromkeys([largest, *(size for size in GROUP_SIZES if largest == -1 or size < largest)])
    dividing = [size for size in sizes if size == -1 or all(t.weight.shape[1] % size == 0 for t in targets)]
    for bits in BITS:
        for size in dividing or [-1]:
            grid = Grid(bits, size)
            if all(_can_have(target, grid) for target in targets):
                yield grid


def _can_have(target: Target, grid: Grid) -> bool:
    try:
        dataclasses.replace(target.config, **vars(grid))
    except ValueError:  # a combination that no client reads
        return False
    return unpackable(tuple(target.weight.shape), grid.bits) is None


def _inventory_of(targets: Sequence[Target], grid: Grid, whole: Inventory) -> Inventory:
    """The inventory of these layers alone on a grid."""
    names = {target.name for target in targets}
    layers = tuple(dataclasses.replace(one, **vars(grid)) for one in whole.layers if one.name in names)
    return dataclasses.replace(whole, layers=layers, floats=(), rules={})


def grids_of(units: Sequence[Unit], chosen: Sequence[Grid], plan: Plan) -> Mapping[str, Grid]:
    """The grid of every layer of a plan: the chosen one of its unit, or its own where that is fixed."""
    of_units = {name: grid for unit, grid in zip(units, chosen, strict=True) for name in unit.names}
    return {target.name: of_units.get(target.name, Grid.of(target.config)) for target in plan.targets}
