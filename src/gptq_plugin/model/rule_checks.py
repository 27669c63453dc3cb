"""Refuses rules and names of a configuration that have no effect on a model, before any work."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import TargetError, some
from gptq_plugin.model.experts import block_of_experts
from gptq_plugin.model.fused_names import fused_name
from gptq_plugin.options.fields import shown
from gptq_plugin.options.rules import matching_rules


def check_rules(config: QuantizeConfig, names: Iterable[str]) -> None:
    """Checks that each `dynamic` rule decides for one of these layers, or for a name under which servers fuse some.

    Raises:
        TargetError: A rule matches nothing, earlier ones match all that it does, or it is for a fused name alone and
            contradicts the layers' own.
    """
    layers = list(names)
    fused = _fused(layers)
    decides: dict[str, list[str]] = defaultdict(list)
    matching: dict[str, list[str]] = defaultdict(list)
    for name in (*layers, *fused):
        decides[config.rule_for(name)[0]].append(name)
        for pattern in matching_rules(config.dynamic, name):
            matching[pattern].append(name)
    for pattern in config.dynamic:
        matched = matching[pattern]
        if not matched:
            raise TargetError(
                f"dynamic: {shown(pattern)} matches none of the {len(layers)} linear layers ({some(layers)}). Rules "
                "are matched from the start of the full name, as re.match does"
            )
        if not decides[pattern]:
            earlier = list(dict.fromkeys(config.rule_for(name)[0] for name in matched))
            raise TargetError(
                f"dynamic: {shown(pattern)} has no effect: the first rule that matches a layer counts, which for "
                f"{some(matched)} is {some(earlier)}. Put it first, or remove it"
            )
        for whole in set(decides[pattern]).intersection(fused).difference(layers):
            wrong = [name for name in fused[whole] if _grid(config, name) != _grid(config, whole)]
            if wrong and not any(name in layers for name in decides[pattern]):
                raise TargetError(
                    f"dynamic: {shown(pattern)} matches {whole}, under which servers compute {some(fused[whole])}, and "
                    "no layer of the model: write a rule that matches those too"
                )


def check_aliases(config: QuantizeConfig, aliases: Mapping[str, Iterable[str]]) -> None:
    """Checks that a layer that occurs in several places gets the same from the rules under each of its names.

    Args:
        config: Has the rules.
        aliases: The further names of such layers, by the first.

    Raises:
        TargetError: It names the layer, and what the rules give it.
    """
    for first, others in aliases.items():
        for other in others:
            if config.for_module(first) != config.for_module(other):
                raise TargetError(
                    f"{first} and {other} are one layer, and the `dynamic` rules give it {_told(config, first)} as the "
                    f"one and {_told(config, other)} as the other: write a rule that matches both names"
                )


def _told(config: QuantizeConfig, name: str) -> str:
    pattern, rule = config.rule_for(name)
    if pattern.startswith("-:"):
        return f"no quantization ({shown(pattern)})"
    return f"{shown(dict(rule))} ({shown(pattern)})" if pattern else "nothing"


def check_effects(config: QuantizeConfig, kept_float: Mapping[str, str]) -> None:
    """Checks that a rule that changes fields is for some layer that is quantized.

    Args:
        config: Has the rules.
        kept_float: Of each linear layer that another option leaves float, why; "" of those that are quantized.

    Raises:
        TargetError: All its layers stay float.
    """
    decides: dict[str, dict[str, str]] = defaultdict(dict)
    for name, why in kept_float.items():
        decides[config.rule_for(name)[0]][name] = why
    for pattern in config.dynamic:
        if not pattern.startswith("-:"):
            reasons = decides[pattern]
            if reasons and all(reasons.values()):
                name, why = next(iter(reasons.items()))
                raise TargetError(
                    f"dynamic: {shown(pattern)} has no effect: all layers it decides for stay float ({name}: {why}). "
                    "Remove it, or change what leaves them float"
                )


def with_deciding_rules(config: QuantizeConfig, names: Iterable[str]) -> QuantizeConfig:
    """The configuration without rules that decide for none of these layers, nor for a name that servers give some."""
    layers = list(names)
    decide = {config.rule_for(name)[0] for name in (*layers, *_fused(layers))}
    return dataclasses.replace(config, dynamic={key: rule for key, rule in config.dynamic.items() if key in decide})


def _fused(layers: Iterable[str]) -> dict[str, list[str]]:
    """Names that servers give layers together, with these: of projections, and of blocks of experts."""
    fused: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        whole = block_of_experts(name) or fused_name(name)
        if whole is not None:
            fused[whole].append(name)
    return fused


def _grid(config: QuantizeConfig, name: str) -> tuple[int, int, bool] | None:
    own = config.for_module(name)
    return None if own is None else (own.bits, own.group_size, own.sym)
