"""Makes the ``quantization_config`` that clients read in config.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from gptq_plugin import __version__
from gptq_plugin.checkpoint.formats.format import Contents, Scheme, contiguous
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.config import QUANTIZER_NAME, QuantizeConfig
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.structure import Structure


def client_config(
    structure: Structure, layers: Mapping[str, QuantLinear], config: QuantizeConfig, also_float: Iterable[str] = ()
) -> dict[str, Any]:
    """`quantization_config` of a model with these quantized layers; see `contents_of`."""
    return describe(contents_of(structure, layers, config, also_float), config)


def contents_of(
    structure: Structure, layers: Mapping[str, QuantLinear], config: QuantizeConfig, also_float: Iterable[str] = ()
) -> Contents:
    """The contents of the checkpoint of a model with these quantized layers.

    Args:
        structure: Of the model: experts that stay float are linear layers to clients.
        layers: Its quantized layers, by name.
        config: What they were quantized with; its `checkpoint_format` is described.
        also_float: Names in the checkpoint of float layers that the model does not have.
    """
    head, stored = structure.published_head, structure.stored_names
    floats = [name for name in structure.linears if name not in layers and name != head]
    scorers = [name for name in structure.routers if name not in structure.linears]

    def under_both_names(own: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(other for name in own for other in (name, stored.get(name, name))))

    schemes = {n: scheme_of(name, layer, config) for name, layer in layers.items() for n in under_both_names([name])}
    return Contents(schemes, [*under_both_names(floats), *also_float], head, under_both_names(scorers))


def scheme_of(name: str, layer: QuantLinear, config: QuantizeConfig) -> Scheme:
    """The scheme of a layer in memory.

    Its desc_act is not config.desc_act: vLLM goes by the flag, and static act-order leaves the groups contiguous.
    """
    sym = (config.for_module(name) or config).sym
    return Scheme(layer.bits, layer.group_size, sym, not contiguous(layer.g_idx, layer.group_size))


def most_and_others(fields: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Turns QuantizeConfig fields by layer into those most layers have, and a `dynamic` rule for each other layer."""
    (most, _), *_ = Counter(tuple(own.items()) for own in fields.values()).most_common(1)
    rules = {f"{re.escape(name)}$": dict(own) for name, own in fields.items() if tuple(own.items()) != most}
    return dict(most), rules


def describe(contents: Contents, config: QuantizeConfig) -> dict[str, Any]:
    """`quantization_config` in the config's `checkpoint_format`, with ``meta`` for what no client reads."""
    description = FORMATS[config.checkpoint_format].describe(contents, config)
    return {**description, "meta": {"quantizer": [f"{QUANTIZER_NAME}:{__version__}"]}}
