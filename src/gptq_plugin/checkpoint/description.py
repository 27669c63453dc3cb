"""``quantization_config`` for config.json: what each client needs to find there, in each format."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_plugin.checkpoint.layouts import contiguous
from gptq_plugin.checkpoint.schemes import PACKED, Scheme
from gptq_plugin.config import COMPRESSED, QUANTIZER_NAME, QuantizeConfig, package_version
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.experts import block_of_experts, routers, unfused
from gptq_plugin.model.hf_models import is_transformers
from gptq_plugin.model.stored_names import stored_names
from gptq_plugin.model.targets import is_linear, linear_shape


@dataclass(frozen=True)
class Contents:
    """What a description is made of. A layer has several names where the checkpoint's is not the model's: clients look
    for either.

    Attributes:
        schemes: Of every quantized layer, by name.
        floats: Linear layers left float, less the output embedding.
        head: Name of the output embedding, or None.
        routers: Of experts, where they are no linear layers. Servers make some of them.
    """

    schemes: Mapping[str, Scheme]
    floats: list[str]
    head: str | None = None
    routers: Sequence[str] = ()


def client_config(model: nn.Module, layers: Mapping[str, QuantLinear], config: QuantizeConfig) -> dict[str, Any]:
    """`quantization_config` of a model with these quantized layers.

    Args:
        model: The model.
        layers: Its quantized layers, by name.
        config: What they were quantized with; its `checkpoint_format` is described.
    """
    head = model.get_output_embeddings() if is_transformers(model) else None  # type: ignore[operator]
    with unfused(model):  # experts that stay float are linear layers to clients
        floats = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
        scorers = [name for name, module in routers(model).items() if not is_linear(module)]
        modules = {name: model.get_submodule(name) for name in (*layers, *floats, *scorers)}
        stored = stored_names(model, {name: _shape(module) for name, module in modules.items()})
    names = [name for name, module in model.named_modules() if head is not None and module is head]

    def under_both_names(own: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(other for name in own for other in (name, stored.get(name, name))))

    schemes = {n: scheme_of(name, layer, config) for name, layer in layers.items() for n in under_both_names([name])}
    contents = Contents(schemes, under_both_names(floats), names[0] if names else None, under_both_names(scorers))
    return describe(contents, config)


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, QuantLinear):
        return module.out_features, module.in_features
    return linear_shape(module) if is_linear(module) else tuple(module.weight.shape)  # type: ignore[return-value, arg-type]


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
        **{f"-:{rule}": {} for rule in _patterns(floats, layers, floats)},
        **_exact_rules(layers, floats, config),
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
    # transformers takes the first group's for all experts (get_experts_scheme).
    counts = Counter(schemes.values())
    of_experts = {scheme for name, scheme in schemes.items() if block_of_experts(name)}
    kinds = sorted(counts, key=lambda kind: (kind not in of_experts, -counts[kind]))
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
        "ignore": [*_ignored(contents), *contents.routers, *head],
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


def _ignored(contents: Contents) -> list[str]:
    """Names of the float layers; of experts that are all float, an expression for all."""
    unit_of = _units(contents.schemes, contents.floats)
    units = {unit_of[name]: name for name in contents.floats}
    return [unit if unit == name else f"re:{re.escape(unit)}\\..*" for unit, name in units.items()]


def _exact_rules(layers: Mapping[str, Scheme], floats: list[str], config: QuantizeConfig) -> dict[str, dict[str, Any]]:
    """Rules for layers of which the configuration's say something else: where `group_size` does not divide their
    inputs, and under names that the user's rules do not know, such as that of a block of experts."""
    unit_of = _units(layers, floats)
    wrong: dict[tuple[tuple[str, Any], ...], list[str]] = defaultdict(list)
    for name, scheme in layers.items():
        own = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
        different: dict[str, Any] = {}
        for known_as in (name, unit_of[name]):
            said = config.for_module(known_as) or config
            different.update({key: value for key, value in own.items() if value != getattr(said, key)})
        if different:
            wrong[tuple({**config.rule_for(name)[1], **different}.items())].append(name)
    return {rule: dict(fields) for fields, names in wrong.items() for rule in _patterns(names, layers, floats)}


def _patterns(names: list[str], layers: Mapping[str, Scheme], floats: list[str]) -> list[str]:
    """Expressions that match `names` and no layers that are otherwise: one for all blocks where they are alike in all,
    and one for all experts, which matches the name of what holds them too. vLLM looks that up."""
    unit_of = _units(layers, floats)
    kinds: dict[str, set[Scheme | None]] = defaultdict(set)
    for name, unit in unit_of.items():
        kinds[_any_number(unit)].add(layers.get(name))
    found: dict[str, None] = {}
    for name in names:
        every_block = _any_number(unit_of[name])
        pattern = every_block if len(kinds[every_block]) == 1 else re.escape(unit_of[name])
        found[pattern + ("$" if unit_of[name] == name else r"(\..*)?$")] = None
    return list(found)


def _units(layers: Mapping[str, Scheme], floats: list[str]) -> dict[str, str]:
    """What each layer is named with: itself, or the block of experts that it is in, where these are all alike."""
    kinds: dict[str | None, set[Scheme | None]] = defaultdict(set)
    blocks = {name: block_of_experts(name) for name in (*layers, *floats)}
    for name, block in blocks.items():
        kinds[block].add(layers.get(name))
    return {name: block if block and len(kinds[block]) == 1 else name for name, block in blocks.items()}


def _any_number(name: str) -> str:
    """An expression for a name with any numbers in place of its own."""
    return re.sub(r"(^|\\\.)\d+(?=\\\.|$)", r"\1\\d+", re.escape(name))


def _kept_suffixes(floats: list[str], layers: Iterable[str]) -> list[str]:
    """Ends of the quantized layers' names: the part below the block, unless a float layer shares it."""
    suffixes: dict[str, None] = {}
    for name in layers:
        below = re.sub(r"^.*?\.\d+\.", "", name)
        suffixes[name if any(other.endswith(below) for other in floats) else below] = None
    return list(suffixes)
