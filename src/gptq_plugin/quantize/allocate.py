"""Chooses the layers' grids within `target_bits` before the pass: `allocate`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from gptq_plugin import distributed
from gptq_plugin.allocation.budget import Budget
from gptq_plugin.allocation.grids import Grid, average_bits, with_grids
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import refuse
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.sensitivity import Sensitivities, measure_sensitivities
from gptq_plugin.report.allocation import Allocation, UnitChoice
from gptq_plugin.report.report import QuantizeReport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Allocated:
    """Chosen grids, and what other budgets are chosen by.

    Attributes:
        asked: The plan before: its configuration has `target_bits`, or is that of the pass.
        plan: With the grids.
        budget: The layers that count; None without `target_bits`, as what follows.
        found: What they do to the model.
        record: For the report.
    """

    asked: Plan
    plan: Plan
    budget: Budget | None = None
    found: Sensitivities | None = None
    record: Allocation | None = None

    def within(self, target_bits: float) -> Plan:
        """The plan of another budget, from the same measurements. Only with a `budget`.

        Raises:
            TargetError: As `Budget.of`.
        """
        assert self.budget is not None and self.found is not None
        budget = self.budget.of_bits(target_bits)
        return with_grids(self.asked, _of_all(self.asked, budget.chosen(self.found.damages)))


def allocate(plan: Plan, calibration: Calibration, options: PassOptions, client: Client | None) -> Allocated:
    """The plan with chosen grids, and what they were chosen by; without `target_bits` the plan itself.

    In a process group every rank calls it, and all choose the same.

    Args:
        plan: The layers.
        calibration: This rank's batches.
        options: As for the pass.
        client: Has to read the result; None is any.

    Raises:
        TargetError, ExportError: As `Budget.of`.
        CalibrationError: As `measure_sensitivities`.
    """
    target_bits = plan.config.target_bits
    if target_bits is None:
        return Allocated(plan, plan)
    started = time.perf_counter()
    found = measure_sensitivities(plan, Budget.of(plan, client).units, calibration, options)
    # Layers that the trials left float will be so in the pass too, and their weights count for nothing.
    counted = [target for target in plan.targets if target.name in found.quantized]
    budget = Budget.of(dataclasses.replace(plan, targets=counted), client)
    grids = budget.chosen(found.damages)
    chosen = with_grids(plan, _of_all(plan, grids))
    refuse(Inventory.of_plan(chosen), client)
    bits = average_bits(counted, grids)
    units = _choices(budget, grids, found)
    record = Allocation(target_bits, bits, found.tokens, time.perf_counter() - started, units)
    if distributed.rank() == 0:
        log.info("%s", record.summary())
    return Allocated(plan, chosen, budget, found, record)


def with_chosen_grids(config: QuantizeConfig, report: QuantizeReport | None, method: str) -> QuantizeConfig:
    """The configuration, with the grids that a run chose if it has `target_bits`.

    Args:
        config: The one asked for.
        report: Of the last run; None without any.
        method: The method that needs the grids.

    Raises:
        ValueError: No run has chosen any.
    """
    if config.target_bits is None:
        return config
    if report is None:
        raise ValueError(
            f"target_bits={config.target_bits:g} chooses the layers' grids by calibration: call quantize before "
            f"{method}, or give bits in place of target_bits"
        )
    return report.config


def _of_all(plan: Plan, grids: Mapping[str, Grid]) -> Mapping[str, Grid]:
    """Those grids, and of other layers their own."""
    return {target.name: grids.get(target.name, Grid.of(target.config)) for target in plan.targets}


def _choices(budget: Budget, grids: Mapping[str, Grid], found: Sensitivities) -> list[UnitChoice]:
    choices = []
    for unit in budget.units:
        grid = grids[unit.names[0]]
        weights = sum(target.stored_weights for target in unit.targets)
        measured = {str(width): value for width, value in found.measured[unit.name].items()}
        divergence = found.damages[unit.name][grid]
        choices.append(
            UnitChoice(unit.name, len(unit.targets), weights, grid.bits, grid.group_size, divergence, measured)
        )
    return choices
