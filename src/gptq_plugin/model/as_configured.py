"""Refuses a transformers model that its configuration does not describe: loaders build it from that."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from gptq_plugin.errors import ExportError, some
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.model.hf_models import is_transformers, published_class, without_weights

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts of names


def refuse_other_than_configured(model: nn.Module) -> None:
    """Compares names and shapes of a float model's parameters with those of one made from its configuration.

    Layers that were taken out, put in or exchanged by hand show so before they are trained. A model with adapters is
    not compared, nor one whose class cannot be made without weights; of sharded parameters only the names are.

    Raises:
        ExportError: They differ.
    """
    if not is_transformers(model) or has_adapters(model):
        return
    ours = dict(model.named_parameters(remove_duplicate=False))
    fresh = _made_anew(model)
    if fresh is None or any(part in name for name in ours for part in _WRAPPED):
        return
    theirs = dict(fresh.named_parameters(remove_duplicate=False))
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
        raise ExportError(
            f"{type(model).__name__} is not the model of its configuration, from which loaders build it: "
            f"{'; '.join(found)}. Give model.config the values of the model in memory (num_hidden_layers, vocab_size, "
            "...), or export a module of your own that holds it"
        )


def _made_anew(model: Any) -> nn.Module | None:
    kind = published_class(model) or type(model)
    try:
        made: nn.Module = without_weights(kind, model.config)
    except Exception:  # noqa: BLE001 - whatever a model's constructor asks for
        return None
    return made


def _is_whole(parameter: Tensor) -> bool:
    return type(parameter) in (nn.Parameter, Tensor) and parameter.numel() > 0
