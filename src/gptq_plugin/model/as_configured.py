"""Refuses a transformers model that its configuration does not describe: loaders build it from that."""

from __future__ import annotations

import inspect
import re
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.errors import ExportError, some
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.model.hf_models import is_transformers, published_class, without_weights
from gptq_plugin.model.linears import is_linear, linear_shape

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts of names


def refuse_other_than_configured(model: nn.Module) -> None:
    """Compares names and shapes of a model's parameters with those of one made from its configuration.

    Layers that were taken out, put in or exchanged by hand show so before they are trained, quantized or written. A
    quantized layer stands for the linear layer of its name; experts that were taken apart for it are not compared. Nor
    is a model with adapters, or one whose class cannot be made without weights; of sharded parameters only the names
    are.

    Raises:
        ExportError: They differ.
    """
    if not is_transformers(model) or has_adapters(model):
        return
    fresh = _made_anew(model)
    if fresh is None or any(part in name for name, _ in model.named_parameters() for part in _WRAPPED):
        return
    ours, theirs = _of_both(model, fresh)
    allowed = [re.compile(one) for one in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    lacking = [name for name in theirs if name not in ours]
    surplus = [name for name in ours if name not in theirs and not any(one.search(name) for one in allowed)]
    others = [
        f"{name} {list(ours[name].shape)} instead of {list(there.shape)}"
        for name, there in theirs.items()
        if name in ours and _is_whole(ours[name]) and ours[name].shape != there.shape
    ]
    found = [
        *([f"it lacks {some(lacking)}"] if lacking else []),
        *([f"it has {some(surplus)} beside"] if surplus else []),
        *([f"it has {some(others)}"] if others else []),
    ]
    if found:
        kind = type(model).__name__
        argument = _other_argument(model, ours.keys())
        remedy = (
            f"It was made with {argument}, which no configuration holds: make it without that argument (the part that "
            "comes with it may stay unused)"
            if argument
            else "Give model.config the values of the model in memory (num_hidden_layers, vocab_size, ...)"
        )
        raise ExportError(
            f"{kind} is not the model of its configuration, from which loaders build it: {'; '.join(found)}. {remedy}, "
            "or export a module of your own that holds it"
        )


def _made_anew(model: Any, **arguments: bool) -> nn.Module | None:
    try:
        made: nn.Module = without_weights(_kind(model), model.config, **arguments)
    except Exception:  # noqa: BLE001 - whatever a model's constructor asks for
        return None
    return made


def _kind(model: nn.Module) -> type:
    return published_class(model) or type(model)


def _other_argument(model: nn.Module, names: Set[str]) -> str | None:
    """The argument of the class beside the configuration, with the value that gives parameters of these names; None if
    none does."""
    for name, one in inspect.signature(_kind(model)).parameters.items():
        other = isinstance(one.default, bool) and _made_anew(model, **{name: not one.default})
        if other and names == {known for known, _ in other.named_parameters(remove_duplicate=False)}:
            return f"{name}={not one.default}"
    return None


def _of_both(model: nn.Module, fresh: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both models' parameters by name, but for modules whose experts are apart. Of ours are those that quantized layers
    stand for; a bias of zeros, which AutoGPTQ writes for layers without one, stands for none."""
    ours: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    theirs: dict[str, Tensor] = dict(fresh.named_parameters(remove_duplicate=False))
    made = dict(fresh.named_modules(remove_duplicate=False))
    apart: set[str] = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, QuantLinear):
            continue
        owner = name
        while owner not in made:
            owner = owner.rpartition(".")[0]
        if owner != name and made[owner]._parameters:
            apart.add(f"{owner}.")
            continue
        shape = (layer.out_features, layer.in_features)
        is_same = owner == name and is_linear(made[name]) and linear_shape(made[name]) == shape
        ours[f"{name}.weight"] = theirs[f"{name}.weight"] if is_same else torch.empty(shape, device="meta")
        if layer.bias is not None and (f"{name}.bias" in theirs or layer.bias.any()):
            ours[f"{name}.bias"] = layer.bias
    for prefix in apart:
        for tensors in (ours, theirs):
            for name in [one for one in tensors if one.startswith(prefix)]:
                del tensors[name]
    return ours, theirs


def _is_whole(parameter: Tensor) -> bool:
    return type(parameter) in (nn.Parameter, Tensor) and parameter.numel() > 0
