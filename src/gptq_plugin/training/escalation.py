"""What to try when a quantized model is not good enough: `steps`, and which layers need it most: `output_noise`.

There are two means. Smaller groups in the whole model keep one grid for all layers, which every client reads. More bits
for the noisiest layers may cost less, but mixed grids are read by this package and GPTQModel, not by transformers, and
by vLLM only where layers that it fuses do not differ. So at every width groups come first, then layers, a few at a
time, until all have the next width, which is one grid again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import TargetError, some
from gptq_plugin.kernels.reference import BITS
from gptq_plugin.model.experts import ExpertLinear
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target, unpackable
from gptq_plugin.report.numbers import format_bits_per_weight

GROUP_SIZES = (128, 64, 32)  # those for which servers have fast kernels
_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the layers that get more bits, step by step


@dataclass(frozen=True)
class Step:
    """One configuration to try.

    Attributes:
        plan: The quantization by the whole configuration.
        bits: Average bits per weight of the quantized layers; see `stored_bytes`.
        what: How it differs from the first configuration, in words.
    """

    plan: Plan
    bits: float
    what: str

    @property
    def config(self) -> QuantizeConfig:
        return self.plan.config


@dataclass(frozen=True)
class _Grid:
    """What a layer's weights are stored as."""

    bits: int
    group_size: int


def steps(plan: Plan, noise: Mapping[str, float]) -> Iterator[Step]:
    """Configurations that promise better than the plan's, and what each takes.

    At every width: the whole model in smaller groups, then the next width for an eighth of the layers that lack it,
    a quarter, half and all of them, the noisiest first, with the groups they had. Groups of a family become smaller,
    and layers more, so that each family's cheapest comes first.

    Args:
        plan: How the model was quantized first.
        noise: By quantized layer, the relative error of its output then.
    """
    targets = plan.targets
    together = _together(targets, noise)
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


def _together(targets: Sequence[Target], noise: Mapping[str, float]) -> list[list[str]]:
    """Layers that get more bits together, the noisiest first: each by itself, but experts of one parameter."""
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
    """The plan with these grids. The one that most layers share is the configuration's, which clients without rules
    read, unless it would reach layers that are float at present, such as those that the old width could not pack."""
    common = Counter(grids.values()).most_common(1)[0][0]
    shared = dataclasses.replace(plan.config, bits=common.bits, group_size=common.group_size)
    with contextlib.suppress(TargetError):
        found = plan.with_config(_with_rules(shared, grids))
        if [target.name for target in found.targets] == list(grids):
            return found
    return plan.with_config(_with_rules(plan.config, grids))


def _with_rules(config: QuantizeConfig, grids: Mapping[str, _Grid]) -> QuantizeConfig:
    """Rules for single layers come first: the first rule that matches a name counts."""
    own = {}
    for name, grid in grids.items():
        found, (_, rule) = config.for_module(name), config.rule_for(name)
        changed = {field: value for field, value in vars(grid).items() if getattr(found, field) != value}
        if changed:
            own[f"{re.escape(name)}$"] = {**rule, **changed}
    others = {pattern: rule for pattern, rule in config.dynamic.items() if pattern not in own}
    return dataclasses.replace(config, dynamic={**own, **others})


@torch.no_grad()
def output_noise(
    model: nn.Module, floats: Mapping[str, nn.Module], batches: Sequence[Callable[[], Any]]
) -> dict[str, float]:
    """How wrong the outputs of quantized layers are, on the inputs they get: Σ‖x(W − Q)ᵀ‖² / Σ‖xWᵀ‖².

    Args:
        model: The quantized model.
        floats: By name, the float layers that its quantized ones replaced.
        batches: Each runs a batch through the model when called.

    Returns:
        By layer, over all ranks; 0 for one that no batch reached.
    """
    wrong = dict.fromkeys(floats, 0.0)
    whole = dict.fromkeys(floats, 0.0)

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            wanted = floats[name](*args, **kwargs).float()
            wrong[name] += float((wanted - output.float()).square().sum())
            whole[name] += float(wanted.square().sum())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(compare(name), with_kwargs=True) for name in floats]
    try:
        for run in batches:
            run()
    finally:
        for handle in handles:
            handle.remove()
    ranks = distributed.gather_objects((wrong, whole))
    total = [{name: sum(one[part][name] for one in ranks) for name in floats} for part in (0, 1)]
    return {name: total[0][name] / total[1][name] if total[1][name] else 0.0 for name in floats}
