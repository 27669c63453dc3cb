"""Quantized layers in the model's tree, and in its transformers configuration: `swapped`, `describe`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from gptq_plugin.checkpoint.description import client_config
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.layers.qlinear import QuantLinear, note_float_rest
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.model.hf_models import is_encoder_decoder, transformers_models
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.structure import Structure


@contextlib.contextmanager
def swapped(plan: Plan, layers: dict[str, QuantLinear]) -> Iterator[Callable[..., None]]:
    """Puts quantized layers in the model's tree; on exit the float ones are there again.

    Yields:
        Call it, as keep(last), to keep the quantized layers. It calls `last` as the last thing that can fail.
    """
    floats = {target.name: target.module for target in plan.targets if target.name in layers}
    kept, tied = False, list[Any]()

    def keep(last: Callable[[], object] = lambda: None) -> None:
        nonlocal kept
        note_float_rest(plan.model)
        last()
        kept = True

    try:
        swap_modules(plan.model, layers)
        describe(plan.structure, layers, plan.config)
        tied += _untied(plan.model)
        yield keep
    finally:
        if not kept:
            for config in tied:
                config.tie_word_embeddings = True
            swap_modules(plan.model, floats)
            describe(plan.structure, {}, plan.config)


def describe(structure: Structure, layers: Mapping[str, QuantLinear], config: QuantizeConfig) -> None:
    """Gives the configuration of the transformers models in a tree a ``quantization_config``.

    It describes the layers as the memory holds them (true zeros), so that a user's `save_pretrained` writes a
    checkpoint that loads. Without layers, it is removed.
    """
    inner: Any
    for name, inner in transformers_models(structure.model):
        prefix = f"{name}." if name else ""
        within = {n.removeprefix(prefix): layer for n, layer in layers.items() if n.startswith(prefix)}
        if within:
            own = structure if inner is structure.model else Structure.of_unfused(inner)
            in_memory = dataclasses.replace(config, checkpoint_format="gptq_v2")
            inner.config.quantization_config = client_config(own, within, in_memory)
        elif hasattr(inner.config, "quantization_config"):
            del inner.config.quantization_config


def _untied(model: nn.Module) -> list[Any]:
    """Tells the configurations of models whose output embedding is quantized that it shares no weight, so that a user's
    `save_pretrained` writes what loads; returns those that told otherwise. An encoder-decoder scales its outputs by it.
    """
    models: list[Any] = [inner for _, inner in transformers_models(model) if not is_encoder_decoder(inner)]
    quantized = [inner for inner in models if isinstance(inner.get_output_embeddings(), QuantLinear)]
    configs = [config for inner in quantized for config in (inner.config, inner.config.get_text_config())]
    tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    for config in tied:
        config.tie_word_embeddings = False
    return tied


def rounded(plan: Plan) -> dict[str, QuantLinear]:
    """A plan's layers, rounded to nearest."""
    return {
        target.name: QuantLinear.from_quantized(
            round_to_nearest(target.weight, target.config), target.bias, target.parameter.dtype
        )
        for target in plan.targets
    }


def copy_training_flags(plan: Plan, layers: Mapping[str, QuantLinear]) -> None:
    """Gives quantized layers the training flags of the float ones that they replace."""
    for target in plan.targets:
        if target.name in layers:
            layers[target.name].train(target.module.training)
