"""Grids of single layers, and the configuration whose exact rules give them: `Grid`, `with_grids`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import TargetError
from gptq_plugin.model.experts import block_of_experts
from gptq_plugin.model.fused_names import fused_name
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.rule_checks import with_deciding_rules
from gptq_plugin.model.targets import Target


@dataclass(frozen=True, order=True)
class Grid:
    """The stored form of a layer's weights: the width of a code, and the channels of a group, or -1."""

    bits: int
    group_size: int

    @classmethod
    def of(cls, config: QuantizeConfig) -> Grid:
        return cls(config.bits, config.group_size)

    def bytes_of(self, target: Target) -> int:
        """Bytes of a layer on this grid, in all its places; see `checkpoint.sizes.stored_bytes`."""
        return target.places * stored_bytes(target.shape, dataclasses.replace(target.config, **vars(self)))


def with_grids(plan: Plan, grids: Mapping[str, Grid]) -> Plan:
    """Returns the plan with these grids for its layers; nothing is left to choose for its configuration.

    The most common grid becomes that of the configuration, which clients without rules read, unless it would reach
    layers that are float now, such as those that cannot be packed at the old width.
    """
    common = Counter(grids.values()).most_common(1)[0][0]
    own = dataclasses.replace(plan.config, target_bits=None)
    shared = dataclasses.replace(own, bits=common.bits, group_size=common.group_size)
    with contextlib.suppress(TargetError):
        found = plan.with_config(_with_rules(shared, grids, plan))
        if {target.name for target in found.targets} == set(grids):
            return found
    return plan.with_config(_with_rules(own, grids, plan))


def _with_rules(config: QuantizeConfig, grids: Mapping[str, Grid], plan: Plan) -> QuantizeConfig:
    """Adds rules for single layers in front, and leaves out others that no longer decide for any."""
    own: dict[str, dict[str, Any]] = {}
    grids = {every: grid for name, grid in grids.items() for every in plan.structure.all_names([name])}
    for name, grid in grids.items():
        changed = _changed(config, name, grid)
        if changed is not None:
            own[f"{re.escape(name)}$"] = changed
    every = plan.structure.all_names(plan.structure.linears)
    own |= _rules_of_fused(config, grids, every)
    others = {pattern: rule for pattern, rule in config.dynamic.items() if pattern not in own}
    return with_deciding_rules(dataclasses.replace(config, dynamic={**own, **others}), every)


def _rules_of_fused(
    config: QuantizeConfig, grids: Mapping[str, Grid], layers: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Rules for the names under which servers look up layers that they fuse, where all of these are quantized alike."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        whole = None if block_of_experts(name) else fused_name(name)
        if whole is not None:
            members[whole].append(name)
    found = {}
    for whole, names in members.items():
        if not grids.keys() >= set(names):
            continue
        rules = [_changed(config, name, grids[name]) for name in names]
        alike = len({grids[name] for name in names}) == 1 and all(rule == rules[0] for rule in rules)
        if alike and rules[0] is not None:
            found[f"{re.escape(whole)}$"] = rules[0]
    return found


def _changed(config: QuantizeConfig, name: str, grid: Grid) -> dict[str, Any] | None:
    """The rule that gives a layer a grid, with what its present rule changes; None if it has that grid."""
    found, (_, rule) = config.for_module(name), config.rule_for(name)
    assert found is not None  # the layer is quantized
    changed = {field: value for field, value in vars(grid).items() if getattr(found, field) != value}
    return {**rule, **changed} if changed else None


def average_bits(targets: Sequence[Target], grids: Mapping[str, Grid]) -> float:
    """Bits per weight of layers on these grids, with scales and zeros as stored."""
    stored = sum(grids[target.name].bytes_of(target) for target in targets)
    return 8 * stored / sum(target.stored_weights for target in targets)
