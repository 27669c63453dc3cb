"""What a checkpoint's description says of one of its modules: GPTQ's and compressed-tensors' ways to say it.

GPTQ: the description's own fields, with the first ``dynamic`` rule whose regular expression matches on top
(GPTQModel). compressed-tensors: the config group with a target that is the module's name, else one whose regular
expression (``re:``) matches it, else one that is a class, such as ``Linear``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_plugin.config import CHECKPOINT_FORMATS, COMPRESSED, rule_regex
from gptq_plugin.errors import CheckpointError
from gptq_plugin.kernels.reference import BITS

PACKED = "pack-quantized"


@dataclass(frozen=True)
class Scheme:
    """How a module is quantized: fields of `QuantizeConfig`. `desc_act` says that groups need not be contiguous."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


def checkpoint_format(quantization: Mapping[str, Any], source: Path) -> str:
    """Which of `CHECKPOINT_FORMATS` a description is about.

    Raises:
        CheckpointError: Another one, or a description that contradicts itself.
    """
    method = quantization.get("quant_method", "gptq")
    if method == COMPRESSED:
        _check_compressed(quantization, source)
        return COMPRESSED
    if method != "gptq":
        raise CheckpointError(
            f"{source}: quant_method is {method!r}; this package reads 'gptq' and {COMPRESSED!r}. Load such a "
            "checkpoint with transformers"
        )
    packing = quantization.get("pack_dtype", "int32")
    if packing not in ("int32", "torch.int32"):
        raise CheckpointError(f"{source}: pack_dtype is {packing!r}; this package reads int32 words")
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{source}: dynamic must map regular expressions to overrides")
    _check_expressions((rule_regex(pattern) for pattern in dynamic), f"{source}: dynamic")
    return _stated_format(quantization, source)


def scheme(quantization: Mapping[str, Any], name: str) -> Scheme:
    """What the description says of the module `name`, which is quantized.

    Raises:
        ValueError: Nothing, or something that cannot be.
    """
    if quantization.get("quant_method") == COMPRESSED:
        weights = _weights(quantization, name)
        bits, group_size = weights.get("num_bits"), weights.get("group_size")
        if weights.get("strategy") == "channel" or group_size is None:
            group_size = -1
        sym, desc_act = weights.get("symmetric", True), weights.get("actorder") in ("group", "dynamic", True)
    else:
        rule = dict(quantization)
        for pattern, overrides in (quantization.get("dynamic") or {}).items():
            if re.match(rule_regex(pattern), name):
                rule.update(overrides or {})
                break
        bits, group_size = rule.get("bits"), rule.get("group_size", -1)
        sym, desc_act = rule.get("sym", True), rule.get("desc_act", False)
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits is {bits!r}; it must be one of {', '.join(map(str, BITS))}")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size < 1 and group_size != -1):
        raise ValueError(f"group_size is {group_size!r}; it must be -1 or a positive integer")
    return Scheme(bits, group_size, bool(sym), bool(desc_act))


def ignored(quantization: Mapping[str, Any], name: str) -> bool:
    """Whether a compressed-tensors description leaves the module `name` float."""
    return any(_matches(entry, name) for entry in quantization.get("ignore") or ())


def _stated_format(quantization: Mapping[str, Any], source: Path) -> str:
    """v1 or v2. AutoGPTQ's files predate the key and are v1; `format` is GPTQModel's alias of it."""
    said = [quantization[key] for key in ("checkpoint_format", "format") if quantization.get(key)]
    if quantization.get("is_marlin_format"):
        said.append("marlin")
    if len(set(said)) > 1:
        raise CheckpointError(
            f"{source}: checkpoint_format and format disagree ({' and '.join(map(repr, said))}), and the "
            "zeros of one read as the other are off by one: correct the wrong one"
        )
    stated: str = said[0] if said else "gptq"
    known = [name for name in CHECKPOINT_FORMATS if name != COMPRESSED]
    if stated not in known:
        raise CheckpointError(
            f"{source}: checkpoint_format is {stated!r}; this package reads {' and '.join(map(repr, known))}, and "
            f"quant_method {COMPRESSED!r}"
        )
    return stated


def _check_compressed(quantization: Mapping[str, Any], source: Path) -> None:
    """Refuses what is not weights of a few bits, packed."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{source}: config_groups must say how modules are quantized, got {groups!r}")
    problems = []
    overall = quantization.get("format")
    for key, group in groups.items():
        weights = group.get("weights")
        stated = group.get("format") or overall
        if stated != PACKED:
            problems.append(f"format is {stated!r}; this package reads {PACKED!r}")
        if not isinstance(weights, dict):
            problems.append("weights are not quantized")
        elif weights.get("type", "int") != "int" or weights.get("dynamic"):
            problems.append(f"weights are {weights.get('type')!r}, dynamic {weights.get('dynamic')!r}, not ints")
        elif weights.get("strategy") not in (None, "group", "channel"):
            problems.append(f"strategy is {weights['strategy']!r}; this package reads 'group' and 'channel'")
        if group.get("input_activations") or group.get("output_activations"):
            problems.append("activations are quantized too")
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            problems.append(f"targets must be a list of names, got {targets!r}")
        else:
            _check_expressions((t.removeprefix("re:") for t in targets if t.startswith("re:")), f"{source}: targets")
        if problems:
            raise CheckpointError(f"{source}: config_groups[{key!r}]: {'; '.join(problems)}. Load it with transformers")
    sparsity = quantization.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense" or quantization.get("transform_config"):
        raise CheckpointError(f"{source}: sparse or transformed weights are not read by this package: use transformers")
    _check_expressions(
        (entry[3:] for entry in quantization.get("ignore") or () if entry.startswith("re:")), f"{source}: ignore"
    )


def _weights(quantization: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config group's ``weights`` that count for a module."""
    groups = quantization["config_groups"].values()
    for kind in (_is_name, _is_expression, _is_class):
        for group in groups:
            if any(kind(target, name) for target in group["targets"]):
                return dict(group["weights"])
    raise ValueError("no config group has a target that matches it")


def _is_name(target: str, name: str) -> bool:
    return target == name


def _is_expression(target: str, name: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], name) is not None


def _is_class(target: str, name: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def _matches(entry: str, name: str) -> bool:
    return _is_name(entry, name) or _is_expression(entry, name)


def _check_expressions(expressions: Iterator[str], where: str) -> None:
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise CheckpointError(f"{where}: {expression!r} is not a regular expression: {error}") from error
