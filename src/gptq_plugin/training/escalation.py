"""Configurations to try if a quantized model is not good enough: `steps`.

There are two means. Smaller groups in the whole model keep one grid for all layers, which every client reads. More bits
for the noisiest layers may cost less, but only this package and GPTQModel read mixed grids; transformers does not, and
vLLM only if the layers that it fuses agree. So at every width smaller groups come first, then more bits for a few
layers at a time, until all have the next width, which is one grid again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import TargetError, some
from gptq_plugin.kernels.reference import BITS
from gptq_plugin.model.experts import ExpertLinear
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.rule_checks import with_deciding_rules
from gptq_plugin.model.targets import Target, unpackable
from gptq_plugin.report.numbers import format_bits_per_weight

GROUP_SIZES = (128, 64, 32)  # servers have fast kernels for these
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
class _Grid:
    """The stored form of a layer's weights."""

    bits: int
    group_size: int


def steps(plan: Plan, noise: Mapping[str, float]) -> Iterator[Step]:
    """Yields configurations that should give better models than the plan's, with the bits each takes.

    At every width these are the whole model in smaller groups, then the next width for an eighth, a quarter, half and
    all of the layers that lack it, noisiest first, in the groups they had. So the cheapest of each kind comes first.

    Args:
        plan: The first quantization of the model.
        noise: By quantized layer, the relative error of its output then.
    """
    targets = plan.targets
    together = _group_by_parameter(targets, noise)
    ranked = [name for names in together for name in names]
    shapes = {target.name: tuple(target.weight.shape) for target in targets}
    configs = {target.name: target.config for target in targets}
    first = {target.name: _Grid(target.config.bits, target.config.group_size) for target in targets}

    def step(grids: dict[str, _Grid], size: int | None = None) -> Step:
        stored = [
            stored_bytes(shapes[name], dataclasses.replace(configs[name], **vars(grids[name]))) for name in ranked
        ]
        average = 8 * sum(stored) / sum(math.prod(shapes[name]) for name in ranked)
        raised = [name for name in ranked if grids[name].bits != first[name].bits]
        means = [f"more bits for {len(raised)} of {len(ranked)} layers ({some(raised)})"] if raised else []
        means += [f"groups of {size} or less in all layers"] if size else []
        what = f"{' and '.join(means)}, {format_bits_per_weight(average)}"
        return Step(_configured(plan, grids), average, what)

    now = first
    while True:
        for size in GROUP_SIZES:
            smaller = {name: dataclasses.replace(grid, group_size=_at_most(grid, size)) for name, grid in now.items()}
            if smaller != now and all(shapes[name][1] % grid.group_size == 0 for name, grid in smaller.items()):
                yield step(smaller, size)
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


def _group_by_parameter(targets: Sequence[Target], noise: Mapping[str, float]) -> list[list[str]]:
    """Groups of layers that get more bits together, noisiest first: single layers, or all experts of one parameter."""
    parameters: dict[str, list[str]] = defaultdict(list)
    for target in targets:
        if target.name in noise:
            whole = target.module.parameter if isinstance(target.module, ExpertLinear) else target.name
            parameters[whole].append(target.name)
    return sorted(parameters.values(), key=lambda names: -sum(noise[name] for name in names) / len(names))


def _at_most(grid: _Grid, size: int) -> int:
    return grid.group_size if 0 < grid.group_size <= size else size


def _next_width(bits: int, shape: tuple[int, ...]) -> int | None:
    return next((width for width in BITS if width > bits and unpackable(shape, width) is None), None)


def _configured(plan: Plan, grids: Mapping[str, _Grid]) -> Plan:
    """Returns the plan with these grids.

    The most common grid becomes that of the configuration, which clients without rules read, unless it would reach
    layers that are float now, such as those that cannot be packed at the old width.
    """
    common = Counter(grids.values()).most_common(1)[0][0]
    shared = dataclasses.replace(plan.config, bits=common.bits, group_size=common.group_size)
    with contextlib.suppress(TargetError):
        found = plan.with_config(_with_rules(shared, grids, plan))
        if [target.name for target in found.targets] == list(grids):
            return found
    return plan.with_config(_with_rules(plan.config, grids, plan))


def _with_rules(config: QuantizeConfig, grids: Mapping[str, _Grid], plan: Plan) -> QuantizeConfig:
    """Adds rules for single layers in front, and leaves out others that no longer decide for any."""
    own = {}
    for name, grid in grids.items():
        found, (_, rule) = config.for_module(name), config.rule_for(name)
        changed = {field: value for field, value in vars(grid).items() if getattr(found, field) != value}
        if changed:
            own[f"{re.escape(name)}$"] = {**rule, **changed}
    others = {pattern: rule for pattern, rule in config.dynamic.items() if pattern not in own}
    return with_deciding_rules(dataclasses.replace(config, dynamic={**own, **others}), plan.structure.linears)
