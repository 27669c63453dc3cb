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
from gptq_plugin.model.experts import ExpertLinear, experts_of
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


def parameter_name(target: Target) -> str:
    """Name of the parameter that holds a layer's weights: the layer's own, or that of all its block's experts."""
    return target.module.parameter if isinstance(target.module, ExpertLinear) else target.name


def is_fixed(target: Target, config: QuantizeConfig) -> bool:
    """True for a layer whose `dynamic` rule sets its width or groups."""
    return not {"bits", "group_size"}.isdisjoint(config.rule_for(target.name)[1])


def units_of(plan: Plan, client: Client | None) -> list[Unit]:
    """The units of a plan's layers, but for those whose `dynamic` rules fix their grids.

    All layers of a block of experts are one unit. q, k and v are one, and gate and up, if the client refuses them on
    different grids.

    Args:
        plan: The layers.
        client: Has to read each grid; None is any.

    Raises:
        ExportError: The client takes none of the grids of a unit; with its reasons.
    """
    free = [target for target in plan.targets if not is_fixed(target, plan.config)]
    reader = _Reader(Inventory.of_plan(plan), client) if client is not None else None
    together: dict[str, list[Target]] = defaultdict(list)
    for target in free:
        together[experts_of(target.name, target.module) or fused_name(target.name) or target.name].append(target)
    units = []
    for name, targets in together.items():
        whole = len(targets) > 1 and (
            experts_of(targets[0].name, targets[0].module) is not None
            or (reader is not None and reader.fuses(targets, plan.config.group_size))
        )
        for members in [targets] if whole else [[target] for target in targets]:
            grids = _grids(members, plan.config.group_size, reader)
            units.append(Unit(name if whole else members[0].name, tuple(members), grids))
    return units


@dataclass(frozen=True)
class _Reader:
    """A client, asked about layers of an inventory on other grids."""

    inventory: Inventory
    client: Client

    def problems(self, targets: Sequence[Target], grids: Sequence[Grid]) -> list[str]:
        """Why the client refuses these layers by themselves, each on its grid."""
        wanted = {target.name: grid for target, grid in zip(targets, grids, strict=True)}
        layers = tuple(
            dataclasses.replace(one, **vars(wanted[one.name])) for one in self.inventory.layers if one.name in wanted
        )
        return problems(dataclasses.replace(self.inventory, layers=layers, floats=(), rules={}), self.client)

    def fuses(self, targets: Sequence[Target], largest: int) -> bool:
        """True if it refuses the layers on different grids, each of which it takes for all of them."""
        taken = [g for g in _possible(targets, largest) if not self.problems(targets, [g] * len(targets))]
        return len(taken) > 1 and bool(self.problems(targets, [taken[-1], *[taken[0]] * (len(targets) - 1)]))


def _grids(targets: Sequence[Target], largest: int, reader: _Reader | None) -> tuple[Grid, ...]:
    possible = tuple(_possible(targets, largest))
    if reader is None:
        return possible
    refused = {grid: reader.problems(targets, [grid] * len(targets)) for grid in possible}
    taken = tuple(grid for grid, reasons in refused.items() if not reasons)
    if not taken:
        reasons = dict.fromkeys(reason for of_grid in refused.values() for reason in of_grid)
        names = some([target.name for target in targets])
        raise ExportError(
            f"{reader.client} takes {names} on no grid that target_bits could give:\n  " + "\n  ".join(reasons)
        )
    return taken


def _possible(targets: Sequence[Target], largest: int) -> Iterator[Grid]:
    """Grids on which all layers can be stored, in groups of the largest size or smaller ones."""
    sizes = dict.fromkeys([largest, *(size for size in GROUP_SIZES if largest == -1 or size < largest)])
    dividing = [size for size in sizes if size == -1 or all(t.shape[1] % size == 0 for t in targets)]
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
    return unpackable(tuple(target.shape), grid.bits) is None


def grids_of(units: Sequence[Unit], chosen: Sequence[Grid], plan: Plan) -> Mapping[str, Grid]:
    """The grid of every layer of a plan: the chosen one of its unit, or its own where that is fixed."""
    of_units = {name: grid for unit, grid in zip(units, chosen, strict=True) for name in unit.names}
    return {target.name: of_units.get(target.name, Grid.of(target.config)) for target in plan.targets}
