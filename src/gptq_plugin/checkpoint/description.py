"""Makes the ``quantization_config`` that clients read in config.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gptq_plugin import __version__
from gptq_plugin.checkpoint.formats.format import Contents, Scheme, trivial_g_idx
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
    floats = structure.all_names(name for name in structure.linears if name not in layers and name != head)
    scorers = [name for name in structure.routers if name not in structure.linears]

    def under_both_names(own: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(other for name in own for other in (name, stored.get(name, name))))

    own = {every: scheme for n, scheme in schemes_of(layers, config).items() for every in structure.all_names([n])}
    schemes = {other: scheme for name, scheme in own.items() for other in under_both_names([name])}
    return Contents(schemes, [*under_both_names(floats), *also_float], head, under_both_names(scorers))


def schemes_of(layers: Mapping[str, QuantLinear], config: QuantizeConfig) -> dict[str, Scheme]:
    """The schemes of layers in memory, by name. Waits for a GPU once a size of them.

    Their desc_act is not config.desc_act: vLLM goes by the flag, and static act-order leaves the groups contiguous.
    """
    alike: dict[tuple[int, int, torch.device], list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault((len(layer.g_idx), layer.group_size, layer.device), []).append(name)
    natural: dict[str, bool] = {}
    for size, names in alike.items():
        same = torch.stack([layers[name].g_idx for name in names]) == trivial_g_idx(*size)
        natural.update(zip(names, same.all(1).tolist(), strict=True))
    return {
        name: Scheme(layer.bits, layer.group_size, (config.for_module(name) or config).sym, not natural[name])
        for name, layer in layers.items()
    }


def most_and_others(fields: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Turns QuantizeConfig fields by layer into those most layers have, and a `dynamic` rule for each other layer."""
    (most, _), *_ = Counter(tuple(own.items()) for own in fields.values()).most_common(1)
    rules = {f"{re.escape(name)}$": dict(own) for name, own in fields.items() if tuple(own.items()) != most}
    return dict(most), rules


def describe(contents: Contents, config: QuantizeConfig) -> dict[str, Any]:
    """`quantization_config` in the config's `checkpoint_format`, with ``meta`` for what no client reads."""
    description = FORMATS[config.checkpoint_format].describe(contents, config)
    return {**description, "meta": {"quantizer": [f"{QUANTIZER_NAME}:{__version__}"]}}
