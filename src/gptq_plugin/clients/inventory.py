"""The contents of a checkpoint, present or future, as far as a client cares: `Inventory`. No weights, no opinions.

It is made of a checkpoint on disk, of a planned quantization or of a quantized model, so that a client's refusal is
known before the work begins (`rules`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.description import schemes_of
from gptq_plugin.checkpoint.formats.format import QuantizedLayer, Scheme
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.experts import ExpertLinear
from gptq_plugin.model.hf_models import is_transformers
from gptq_plugin.model.linears import linear_shape
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import Target
from gptq_plugin.report.report import QuantizeReport

_HEADS = ("lm_head", "embed_out")  # names of output embeddings; in a block no layer is called so


@dataclass(frozen=True)
class LayerEntry:
    """One quantized layer. `act_order`: its groups are not contiguous, so that it needs a g_idx."""

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    sym: bool
    act_order: bool


@dataclass(frozen=True)
class Inventory:
    """The contents of a checkpoint.

    Attributes:
        checkpoint_format: One of `config.CHECKPOINT_FORMATS`.
        layers: The quantized layers.
        floats: Names of the linear layers inside the blocks that are not quantized.
        lm_head: The output embedding is quantized.
        desc_act: The description's flag for act-order, which some clients obey.
        rules: The description's `dynamic` rules that change a grid, not those that leave layers float.
        dtype: Of the float weights, and so of a server's activations.
        model_type: transformers' name of the architecture; None for any other module.
        activations: By layer, its largest absolute input or output, where calibration saw it.
    """

    checkpoint_format: str
    layers: tuple[LayerEntry, ...]
    floats: tuple[str, ...]
    lm_head: bool
    desc_act: bool
    rules: Mapping[str, Mapping[str, Any]]
    dtype: torch.dtype
    model_type: str | None
    activations: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_plan(cls, plan: Plan) -> Inventory:
        """The inventory of the export of a planned quantization, under the model's names."""
        return cls._of(plan.structure, [_planned(target) for target in plan.targets], plan.config)

    @classmethod
    def of_layers(
        cls,
        structure: Structure,
        layers: Mapping[str, QuantLinear],
        config: QuantizeConfig,
        report: QuantizeReport | None = None,
    ) -> Inventory:
        """The inventory of the export of a quantized model, under the model's names.

        Args:
            structure: Of the model, made before or after it was quantized.
            layers: Its quantized layers; a shared one once.
            config: What they were quantized with.
            report: Knows the activations of calibration.
        """
        schemes = schemes_of(layers, config)
        inventory = cls._of(structure, [_entry(n, layer, schemes[n]) for n, layer in layers.items()], config)
        if report is None:
            return inventory
        return replace(
            inventory, activations={m.name: m.largest for m in report.quantized if not math.isnan(m.largest)}
        )

    @classmethod
    def _of(cls, structure: Structure, layers: Sequence[LayerEntry], config: QuantizeConfig) -> Inventory:
        names = {layer.name for layer in layers}
        floats = [name for name in (*structure.linears, *structure.routers) if name not in names]
        return cls(
            config.checkpoint_format,
            tuple(sorted(layers, key=lambda layer: layer.name)),
            _in_blocks(dict.fromkeys(floats), names),
            structure.published_head in names,
            any(layer.act_order for layer in layers),
            _grid_rules(config.dynamic if FORMATS[config.checkpoint_format].has_rules else {}),
            _largest_dtype(structure, names),
            _model_type(structure.model),
        )

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Inventory:
        """The inventory of a checkpoint, under its own names. Reads group indices, no weights."""
        description = checkpoint.quantization
        layers = tuple(_entry(n, layer, checkpoint.scheme(n)) for n, layer in sorted(checkpoint.layers.items()))
        matrices = (
            name.removesuffix(".weight")
            for name in checkpoint.float_names
            if name.endswith(".weight") and len(checkpoint.tensors[name].shape) == 2
        )
        named = any(layer.name.rpartition(".")[2] in _HEADS for layer in layers)
        return cls(
            checkpoint.checkpoint_format,
            layers,
            _in_blocks(matrices, checkpoint.layers),
            bool(description.get("lm_head")) or named,
            any(layer.desc_act for layer in checkpoint.layers.values()),
            _grid_rules(description.get("dynamic") or {}),
            checkpoint.float_dtype,
            checkpoint.model_config.get("model_type"),
        )


def _planned(target: Target) -> LayerEntry:
    own, (out_features, in_features) = target.config, linear_shape(target.module)
    several = own.group_size != -1 and own.group_size < in_features
    act_order = own.desc_act and not own.static_groups and several
    return LayerEntry(target.name, own.bits, own.group_size, in_features, out_features, own.sym, act_order)


def _entry(name: str, layer: QuantLinear | QuantizedLayer, scheme: Scheme) -> LayerEntry:
    return LayerEntry(
        name, scheme.bits, scheme.group_size, layer.in_features, layer.out_features, scheme.sym, scheme.desc_act
    )


def _grid_rules(dynamic: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    return {pattern: dict(rule or {}) for pattern, rule in dynamic.items() if not pattern.startswith("-:")}


def _in_blocks(names: Iterable[str], quantized: Iterable[str]) -> tuple[str, ...]:
    """The names in lists of modules of which some are quantized, sorted."""
    stacks = {_stack(name) for name in quantized}
    return tuple(sorted(name for name in names if _stack(name) in stacks))


def _stack(name: str) -> str:
    """``"model.layers."`` of ``"model.layers.0.mlp.up_proj"``; without a number, the parent module."""
    numbered = re.match(r"(.*?\.|)\d+\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0]


def _model_type(model: nn.Module) -> str | None:
    kind: str | None = model.config.model_type if is_transformers(model) else None  # type: ignore[union-attr, assignment]
    return kind


def _largest_dtype(structure: Structure, quantized: set[str]) -> torch.dtype:
    """The dtype that `Checkpoint.float_dtype` will give."""
    experts = [structure.linears.get(name) for name in quantized]
    fused = {
        layer.parameter for layer in experts if isinstance(layer, ExpertLinear)
    }  # the parameter, if they are fused again
    tensors = [
        tensor
        for name, tensor in structure.model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if name not in fused and name.rpartition(".")[0] not in quantized
    ]
    largest = max(tensors, key=lambda tensor: tensor.numel(), default=None)
    return largest.dtype if largest is not None else torch.float16
