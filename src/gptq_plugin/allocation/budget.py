"""The bytes that layers may take together, and the choice of their grids within: `Budget`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from gptq_plugin.allocation.choice import Choices, Option
from gptq_plugin.allocation.grids import Grid, with_grids
from gptq_plugin.allocation.units import Unit, grids_of, is_fixed, units_of
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import problems
from gptq_plugin.errors import ExportError, TargetError, some
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.structure import Structure


@dataclass(frozen=True)
class Budget:
    """The units whose grids are to be chosen, and what they may take.

    Attributes:
        plan: The layers. Its configuration has `target_bits`.
        units: Those whose grids no `dynamic` rule fixes.
        bytes: What the units may take together: `target_bits` of all layers, less what the fixed ones take.
    """

    plan: Plan
    units: Sequence[Unit]
    bytes: int

    @classmethod
    def of(cls, plan: Plan, client: Client | None) -> Budget:
        """The budget of a plan.

        Args:
            plan: The layers.
            client: Has to read the result; None is any.

        Raises:
            TargetError: No choice of grids has so few bits, or so many; or rules fix all grids.
            ExportError: The client takes a layer on none of the grids, or none beside each other.
        """
        units = units_of(plan, client)
        fixed = [target for target in plan.targets if is_fixed(target, plan.config)]
        target_bits = plan.config.target_bits
        assert target_bits is not None
        if not units:
            raise TargetError(
                f"target_bits={target_bits:g} leaves nothing to choose: `dynamic` rules set bits or group_size of all "
                f"{len(fixed)} layers ({some([target.name for target in fixed])}). Leave target_bits or those out"
            )
        budget = cls(plan, units, 0).of_bits(target_bits)
        if client is not None:
            budget._check_mixed(client)
        return budget

    def of_bits(self, target_bits: float) -> Budget:
        """The budget of as many bits per weight for the same layers.

        Raises:
            TargetError: No choice of grids has so few, or so many.
        """
        weights = sum(target.stored_weights for target in self.plan.targets)
        fixed = [target for target in self.plan.targets if is_fixed(target, self.plan.config)]
        own = sum(Grid.of(target.config).bytes_of(target) for target in fixed)
        left = int(target_bits * weights / 8) - own
        least, most = (sum(find(map(unit.bytes_on, unit.grids)) for unit in self.units) for find in (min, max))
        if not least <= left <= most:
            bounds = 8 * (own + least) / weights, 8 * (own + most) / weights
            raise TargetError(_impossible(self.plan, target_bits, *bounds))
        return replace(self, bytes=left)

    def chosen(self, damages: Mapping[str, Mapping[Grid, float]]) -> Mapping[str, Grid]:
        """The grid of every layer: of all choices within the budget the one that does the least damage.

        Args:
            damages: By unit, then grid.
        """
        options = [
            [Option(unit.bytes_on(grid), damages[unit.name][grid]) for grid in unit.grids] for unit in self.units
        ]
        places = Choices(options).within(self.bytes)
        chosen = [unit.grids[place] for unit, place in zip(self.units, places, strict=True)]
        return grids_of(self.units, chosen, self.plan)

    def provisional(self) -> Plan:
        """A plan of the right size before anything is measured, as if all layers mattered alike."""
        damages = {unit.name: {grid: _expected(grid) * len(unit.targets) for grid in unit.grids} for unit in self.units}
        return with_grids(self.plan, self.chosen(damages))

    def _check_mixed(self, client: Client) -> None:
        """Asks the client about units on their first and last grids by turns.

        Raises:
            ExportError: It does not take layers of different grids.
        """
        by_turns = [unit.grids[-(number % 2)] for number, unit in enumerate(self.units)]
        mixed = with_grids(self.plan, grids_of(self.units, by_turns, self.plan))
        found = problems(Inventory.of_plan(mixed), client)
        if found:
            raise ExportError(
                f"{client} would not take what target_bits makes, layers of different grids. Leave target_bits out, or "
                "change the following:\n  " + "\n  ".join(found)
            )


def output_embedding(structure: Structure) -> nn.Module:
    """The layer whose distributions `target_bits` compares.

    Raises:
        TargetError: The model has none.
    """
    if structure.head is None:
        raise TargetError(
            "target_bits compares the distributions of tokens that a model predicts, and "
            f"{type(structure.model).__name__} has no output embedding: leave target_bits out, and give bits, and "
            "`dynamic` rules for single layers"
        )
    return structure.head


def check_budget(plan: Plan, client: Client | None) -> Plan:
    """Refuses a `target_bits` that cannot be; returns a plan of that size. A plan without one is returned as it is.

    Raises:
        TargetError, ExportError: As `Budget.of` and `output_embedding`.
    """
    if plan.config.target_bits is None:
        return plan
    output_embedding(plan.structure)
    return Budget.of(plan, client).provisional()


def _expected(grid: Grid) -> float:
    """How the squared error of a grid compares with others'."""
    return 4.0**-grid.bits * (grid.group_size if grid.group_size > 0 else 512) ** 0.25


def _impossible(plan: Plan, target_bits: float, least: float, most: float) -> str:
    size, format_ = plan.config.group_size, plan.config.checkpoint_format
    message = (
        f"target_bits={target_bits:g}: the quantized layers take {least:.3f} to {most:.3f} bits per weight, with "
        f"scales and zeros as {format_} stores them, and with what `dynamic` rules fix. Give a number in between"
    )
    return message + (", or a larger group_size" if target_bits < least and size != -1 else "")
