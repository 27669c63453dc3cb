"""Experts that transformers' code multiplies in one product: `Grouped`, `called_at_once`.

transformers has several implementations of experts and a name for each in the configuration. While batches walk, the
one with grouped products runs experts that are apart, so that all of one parameter are called at once. Which modules
have it is not known before a forward calls them.

Tested by tests/quantize/test_experts_pass.py: with the forwards that call them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gptq_plugin.device.modules import modules_of
from gptq_plugin.model import experts_served
from gptq_plugin.model.expert_weights import ExpertWeights
from gptq_plugin.model.experts_call import ExpertsCall
from gptq_plugin.walk.groups import Group


@dataclass(frozen=True)
class Grouped:
    """The layers of all experts of one parameter.

    Attributes:
        name: Full name of the parameter that they were.
        module: The module that had it.
        call: Gets the rows of all experts.
        layers: Full names of each expert's layers.
        in_features: Their inputs.
    """

    name: str
    module: nn.Module
    call: ExpertsCall
    layers: tuple[tuple[str, ...], ...]
    in_features: int


def find_grouped(model: nn.Module) -> list[Grouped]:
    """The parameters whose experts are apart, and whose module may run them in grouped products."""
    return [
        Grouped(f"{name}.{key}", module, value.call, value.names_below(name), value.in_features)
        for name, module in modules_of(model).items()
        for key, value in module.__dict__.items()
        if isinstance(value, ExpertWeights) and hasattr(getattr(module, "config", None), "_experts_implementation")
    ]


def calls_of(grouped: Mapping[str, Grouped]) -> dict[str, nn.Module]:
    """The calls, by name."""
    return {name: one.call for name, one in grouped.items()}


@contextlib.contextmanager
def in_grouped_products(some: Collection[Grouped]) -> Iterator[None]:
    """Inside the block transformers' modules run these experts in grouped products.

    A module gets a configuration of its own, since others have the same one.
    """
    experts_served.register()
    with contextlib.ExitStack() as stack:
        for module in dict.fromkeys(one.module for one in some):
            config: Any = module.config
            own = copy.copy(config)
            own._experts_implementation = {"": experts_served.IMPLEMENTATION}  # not those of the configurations in it
            module.config = own
            stack.callback(setattr, module, "config", config)
        yield


@contextlib.contextmanager
def called_at_once(some: Collection[Grouped], but: int = 0) -> Iterator[None]:
    """Inside the block grouped products call these experts at once: hooks on their layers see nothing.

    Args:
        some: The experts.
        but: See `ExpertsCall.as_one`.
    """
    with contextlib.ExitStack() as stack:
        for one in some:
            stack.enter_context(one.call.as_one(but))
        yield


def as_called(groups: Sequence[Group], grouped: Mapping[str, Grouped]) -> list[Group]:
    """Groups of layers and calls of experts: calls stand for the layers of all experts, those that were made and those
    that another batch may make, of a module of the same class.

    Args:
        groups: Of layers, and of calls by their names.
        grouped: The calls, by name.
    """
    made = {name for name, one in grouped.items() if one.call.count}
    kinds = {type(grouped[name].module) for name in made}
    of_kinds = [name for name, one in grouped.items() if type(one.module) in kinds]
    call_of = {layer: name for name in of_kinds for own in grouped[name].layers for layer in own}
    placed = set(made)
    found = []
    for group in groups:
        calls = tuple(name for name in group.names if name in made)
        others = tuple(name for name in group.names if name not in grouped and name not in call_of)
        if calls:
            found.append(_at_once(calls, grouped, group.calls))
        for name in dict.fromkeys(call_of[name] for name in group.names if name in call_of):
            if name not in placed:  # where its first layer is
                placed.add(name)
                found.append(_at_once((name,), grouped))
        if others:
            found.append(replace(group, names=others))
    return found


def _at_once(calls: tuple[str, ...], grouped: Mapping[str, Grouped], times: int = 1) -> Group:
    by_expert = zip(*(grouped[name].layers for name in calls), strict=True)
    return Group(tuple(name for own in by_expert for layers in own for name in layers), times, calls)


def call_others_apart(groups: Sequence[Group], grouped: Mapping[str, Grouped]) -> None:
    """Has experts that are in no group of `as_called` called one by one: other batches may come to them."""
    at_once = {name for group in groups for name in group.at_once}
    for name in grouped.keys() - at_once:
        grouped[name].call.call_layers()


def by_expert(group: Group, grouped: Mapping[str, Grouped]) -> list[tuple[str, ...]]:
    """The layers of each expert in a group of experts that are called at once."""
    members = set(group.names)
    of_calls = zip(*(grouped[name].layers for name in group.at_once), strict=True)
    return [tuple(name for layers in own for name in layers if name in members) for own in of_calls]


@contextlib.contextmanager
def two_called(grouped: Mapping[str, Grouped]) -> Iterator[set[str]]:
    """Inside the block the layers of two experts are called, of each parameter whose experts were called at once; what
    holds for two holds for all, since the call is code of this package.

    Yields:
        The layers of the others.
    """
    made = [one for one in grouped.values() if one.call.count]
    with called_at_once(made, but=2):
        yield {name for one in made for own in one.layers[2:] for name in own}


def called(
    groups: Sequence[Group], layers: Mapping[str, nn.Module], grouped: Mapping[str, Grouped]
) -> dict[str, nn.Module]:
    """What forwards call, by name: layers, and calls of all experts in place of theirs."""
    made = {name for group in groups for name in group.at_once}
    covered = {layer for name in made for own in grouped[name].layers for layer in own}
    others = {name: module for name, module in layers.items() if name not in covered}
    return others | {name: grouped[name].call for name in made}


def stack_experts(model: nn.Module) -> list[str]:
    """Lets one product serve the quantized layers of all experts of a parameter, where grouped products can call them.

    transformers' modules, which `place_experts` had run expert by expert, run in grouped products again
    (`experts_served`): without gradients those take the stacked layers, and otherwise call them.

    Returns:
        The names of the parameters whose layers are stacked.
    """
    of_configs: dict[int, list[Grouped]] = {}
    for one in find_grouped(model):
        config: Any = one.module.config
        of_configs.setdefault(id(config), []).append(one)
    stacked = [some for some in of_configs.values() if all(one.call.stack() for one in some)]
    for some in stacked:
        config = some[0].module.config
        experts_served.register()
        config._experts_implementation = experts_served.IMPLEMENTATION
    return [one.name for some in stacked for one in some]
