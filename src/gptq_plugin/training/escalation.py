"""Configurations to try if a quantized model is not good enough: `steps`; with `target_bits`, `budget_steps`.

Without a budget there are two means. Smaller groups in the whole model keep one grid for all layers, which every
client reads. More bits for the layers that do most to the model, for their size, may cost less, but only this package
and GPTQModel read mixed grids; transformers does not, and vLLM only if the layers that it fuses agree. So at every
width smaller groups come first, then more bits for a few layers at a time, until all have the next width, which is one
grid again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptq_plugin.allocation.grids import Grid, average_bits, with_grids
from gptq_plugin.allocation.units import GROUP_SIZES, parameter_name
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import TargetError, some
from gptq_plugin.kernels.reference import BITS
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target, unpackable
from gptq_plugin.quantize.allocate import Allocated
from gptq_plugin.report.numbers import format_bits_per_weight

_MORE_BITS = 0.25  # from one budget to the next
_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the layers, that get more bits step by step


@dataclass(frozen=True)
class Step:
    """One configuration to try.

    Attributes:
        plan: The quantization with it.
        bits: Average bits per weight of the quantized layers; see `stored_bytes`.
        what: Its difference from the first configuration, in words.
    """

    plan: Plan
    bits: float
    what: str

    @property
    def config(self) -> QuantizeConfig:
        return self.plan.config


@dataclass(frozen=True)
class Ranking:
    """What layers get more bits by.

    Attributes:
        of_layer: By layer: the larger, the sooner.
        remark: How they were ranked, in words that follow their names; empty for `sensitivity.measure_layers`.
    """

    of_layer: Mapping[str, float]
    remark: str = ""


def steps(plan: Plan, quantized: Collection[str], rank: Callable[[], Ranking]) -> Iterator[Step]:
    """Yields configurations that should give better models than the plan's, with the bits each takes.

    At every width these are the whole model in smaller groups, then the next width for an eighth, a quarter, half and
    all of the layers that lack it, in the order of their ranking and in the groups they had. So the cheapest of each
    kind comes first.

    Args:
        plan: The first quantization of the model.
        quantized: Names of the layers that it quantized.
        rank: Called once, when layers are to get more bits, after the attempts before.
    """
    targets = [target for target in plan.targets if target.name in quantized]
    ranking, together = Ranking({}), list[list[str]]()
    shapes = {target.name: target.shape for target in plan.targets}
    first = {target.name: Grid.of(target.config) for target in plan.targets}

    def step(grids: dict[str, Grid], size: int | None = None) -> Step:
        average = average_bits(targets, grids)
        raised = [name for names in together for name in names if grids[name].bits != first[name].bits]
        more = f"more bits for {len(raised)} of {len(targets)} layers ({some(raised)}{ranking.remark})"
        means = [more] if raised else []
        means += [f"groups of {size} or less in all layers"] if size else []
        what = f"{' and '.join(means)}, {format_bits_per_weight(average)}"
        return Step(with_grids(plan, grids), average, what)

    now = first
    while True:
        for size in GROUP_SIZES:
            smaller = {name: dataclasses.replace(grid, group_size=_at_most(grid, size)) for name, grid in now.items()}
            if smaller != now and all(shapes[name][1] % grid.group_size == 0 for name, grid in smaller.items()):
                yield step(smaller, size)
        if not together:
            ranking = rank()
            together = _group_by_parameter(targets, ranking.of_layer)
        wider = [
            {name: width for name in names if (width := _next_width(now[name].bits, shapes[name])) is not None}
            for names in together
        ]
        wider = [widths for widths in wider if widths]
        if not wider:
            return
        before = now
        for count in sorted({math.ceil(share * len(wider)) for share in _SHARES}):
            raised = {name: width for widths in wider[:count] for name, width in widths.items()}
            now = before | {name: dataclasses.replace(before[name], bits=width) for name, width in raised.items()}
            yield step(now)


def budget_steps(allocated: Allocated) -> Iterator[Step]:
    """Yields larger budgets of a run with `target_bits`, a quarter of a bit at a time, up to the largest that its grids
    allow, each divided by what was measured for the first.

    Args:
        allocated: Of the first attempt, with a budget.
    """
    assert allocated.record is not None
    for number in itertools.count(1):
        bits = allocated.record.target_bits + number * _MORE_BITS
        try:
            plan = allocated.within(bits)
        except TargetError:
            return
        average = average_bits(plan.targets, {target.name: Grid.of(target.config) for target in plan.targets})
        yield Step(plan, average, f"a budget of {bits:g} bits per weight, {format_bits_per_weight(average)}")


def _group_by_parameter(targets: Sequence[Target], ranks: Mapping[str, float]) -> list[list[str]]:
    """Groups of layers that get more bits together, in their order: single layers, or all experts of one parameter."""
    parameters: dict[str, list[str]] = defaultdict(list)
    for target in targets:
        parameters[parameter_name(target)].append(target.name)
    return sorted(parameters.values(), key=lambda names: -sum(ranks[name] for name in names) / len(names))


def _at_most(grid: Grid, size: int) -> int:
    return grid.group_size if 0 < grid.group_size <= size else size


def _next_width(bits: int, shape: tuple[int, ...]) -> int | None:
    return next((width for width in BITS if width > bits and unpackable(shape, width) is None), None)
