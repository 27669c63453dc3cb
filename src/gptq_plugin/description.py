"""``quantization_config`` for config.json: what each client needs to find there, in each format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_plugin.config import QUANTIZER_NAME, QuantizeConfig, package_version
from gptq_plugin.layouts import contiguous
from gptq_plugin.pretrained import is_transformers
from gptq_plugin.qlinear import QuantLinear
from gptq_plugin.schemes import COMPRESSED, PACKED, Scheme
from gptq_plugin.targets import is_linear


@dataclass(frozen=True)
class Contents:
    """What a description is made of.

    Attributes:
        schemes: Of every quantized layer, by name.
        floats: Linear layers left float, less the output embedding.
        head: Name of the output embedding, or None.
    """

    schemes: Mapping[str, Scheme]
    floats: list[str]
    head: str | None = None


def client_config(model: nn.Module, layers: Mapping[str, QuantLinear], config: QuantizeConfig) -> dict[str, Any]:
    """`quantization_config` of a model with these quantized layers.

    Args:
        model: The model.
        layers: Its quantized layers, by name.
        config: What they were quantized with; its `checkpoint_format` is described.
    """
    head = model.get_output_embeddings() if is_transformers(model) else None  # type: ignore[operator]
    floats = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
    names = [name for name, module in model.named_modules() if head is not None and module is head]
    schemes = {name: scheme_of(name, layer, config) for name, layer in layers.items()}
    return describe(Contents(schemes, floats, names[0] if names else None), config)


def scheme_of(name: str, layer: QuantLinear, config: QuantizeConfig) -> Scheme:
    """How a layer in memory is quantized.

    Its desc_act is not config.desc_act: vLLM goes by the flag, and static act-order leaves the groups contiguous.
    """
    sym = (config.for_module(name) or config).sym
    return Scheme(layer.bits, layer.group_size, sym, not contiguous(layer.g_idx, layer.group_size))


def most_and_others(fields: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Fields of QuantizeConfig by layer, as a configuration says them: what most layers have, and a `dynamic` rule for
    each of the others."""
    (most, _), *_ = Counter(tuple(own.items()) for own in fields.values()).most_common(1)
    rules = {f"{re.escape(name)}$": dict(own) for name, own in fields.items() if tuple(own.items()) != most}
    return dict(most), rules


def describe(contents: Contents, config: QuantizeConfig) -> dict[str, Any]:
    """`quantization_config`, with ``meta`` for what no client reads.

    Args:
        contents: What is quantized, and how.
        config: bits, group_size, sym, dynamic and checkpoint_format are read.
    """
    description = _compressed(contents) if config.checkpoint_format == COMPRESSED else _gptq(contents, config)
    return {**description, "meta": {"quantizer": [f"{QUANTIZER_NAME}:{package_version()}"]}}


def _gptq(contents: Contents, config: QuantizeConfig) -> dict[str, Any]:
    """Only keys that GPTQModel, transformers and vLLM all take.

    Linears left float inside the blocks are told twice: GPTQModel wants ``dynamic`` rules, transformers a list of
    those that are quantized.
    """
    layers, floats = contents.schemes, contents.floats
    dynamic = {
        **{rule: {} for rule in _skip_rules(floats, layers)},
        **_other_groups(layers, config),
        **{k: dict(v) for k, v in config.dynamic.items()},
    }
    description: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": any(scheme.desc_act for scheme in layers.values()),
        "sym": config.sym,
        "lm_head": contents.head in layers,
        "checkpoint_format": config.checkpoint_format,
        "format": config.checkpoint_format,
        "pack_dtype": "int32",
    }
    if dynamic:
        description["dynamic"] = dynamic
    if floats:
        description["modules_in_block_to_quantize"] = [_kept_suffixes(floats, layers)]
    return description


def _compressed(contents: Contents) -> dict[str, Any]:
    """A config group for each way a layer is quantized; the most common one takes every ``Linear`` that is not
    named otherwise, since clients give a name precedence over a class. Float layers are all named in ``ignore``."""
    schemes = contents.schemes
    kinds = [kind for kind, _ in Counter(schemes.values()).most_common()]
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if i == 0 else [name for name, scheme in schemes.items() if scheme == kind],
            "format": PACKED,
            "weights": _weights(kind),
            "input_activations": None,
            "output_activations": None,
        }
        for i, kind in enumerate(kinds)
    }
    head = [contents.head] if contents.head is not None and contents.head not in schemes else []
    return {
        "quant_method": COMPRESSED,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*contents.floats, *head],
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }


def _other_groups(layers: Mapping[str, Scheme], config: QuantizeConfig) -> dict[str, dict[str, Any]]:
    """A rule for each layer whose inputs `group_size` does not divide."""
    return {
        f"{re.escape(name)}$": {**config.rule_for(name)[1], "group_size": scheme.group_size}
        for name, scheme in layers.items()
        if scheme.group_size != (config.for_module(name) or config).group_size
    }


def _skip_rules(floats: list[str], layers: Iterable[str]) -> list[str]:
    """``-:`` rules that match exactly `floats`, one rule for all blocks where no block is quantized."""
    rules: dict[str, None] = {}
    for name in floats:
        every_block = re.sub(r"(^|\\\.)\d+(?=\\\.|$)", r"\1\\d+", re.escape(name)) + "$"
        quantized_too = any(re.match(every_block, other) for other in layers)
        rules[f"-:{re.escape(name)}$" if quantized_too else f"-:{every_block}"] = None
    return list(rules)


def _kept_suffixes(floats: list[str], layers: Iterable[str]) -> list[str]:
    """Ends of the quantized layers' names: the part below the block, unless a float layer shares it."""
    suffixes: dict[str, None] = {}
    for name in layers:
        below = re.sub(r"^.*?\.\d+\.", "", name)
        suffixes[name if any(other.endswith(below) for other in floats) else below] = None
    return list(suffixes)
