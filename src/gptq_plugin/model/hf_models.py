"""Finds transformers models in a tree, and tells what they do. Nothing here imports transformers."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gptq_plugin.device.surroundings import same_random_numbers
from gptq_plugin.errors import ExportError, brief

# model_type of the architectures whose layers are transformers' Conv1D instead of nn.Linear.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")


def is_transformers(module: nn.Module) -> bool:
    """True for a transformers model; without transformers in the process there are none."""
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    return kind is not None and isinstance(module, kind)


def is_encoder_decoder(module: nn.Module) -> bool:
    """True for a transformers model that reads one sequence and writes another."""
    return is_transformers(module) and bool(getattr(module.config, "is_encoder_decoder", False))


def predicts_next(module: nn.Module) -> bool:
    """True if position i predicts label i + 1, because the model's loss shifts the labels.

    transformers' decoders that generate do. Encoder-decoders shift their inputs instead, heads for masked tokens or
    token classes shift nothing, and a model without a head has no loss.
    """
    return generates(module) and not is_encoder_decoder(module)


def generates(module: nn.Module) -> bool:
    """True for a transformers model that generates sequences."""
    return is_transformers(module) and bool(module.can_generate())  # type: ignore[operator]


def transformers_models(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost transformers models in a tree, with their dotted names."""
    if is_transformers(root):
        yield prefix, root
        return
    for name, child in root.named_children():
        yield from transformers_models(child, f"{prefix}.{name}" if prefix else name)


def tied_weights(model: nn.Module) -> dict[str, str]:
    """The weights of a transformers model that its class ties to others, by name, which are in no file of it, and the
    names of those."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def without_weights(kind: Any, config: Any, **arguments: Any) -> Any:
    """Makes a transformers model of a class and a configuration on the meta device. Random numbers stay as they were.
    `arguments` are further ones of the class.

    Raises:
        Exception: Whatever the constructor raises for values that it does not expect.
    """
    with same_random_numbers(), torch.device("meta"):
        return kind(copy.deepcopy(config), **arguments)


def published_class(model: nn.Module) -> type | None:
    """The transformers class of a model, or the one that a user's subclass (a LightningModule, say) derives from; None
    for an architecture that transformers does not have."""
    library = sys.modules["transformers"]
    for kind in type(model).__mro__:
        if getattr(library, kind.__name__, None) is kind:
            # PreTrainedModel and the abstract bases of the families are not architectures.
            return None if kind.__name__.endswith("PreTrainedModel") else kind
    return None


def check_savable(model: nn.Module) -> None:
    """Refuses, before any work, a generation config that transformers would refuse to save, one that was changed and
    contradicts itself; and names of modules that cannot be printed, which no reader takes.

    Raises:
        ExportError: With transformers' message, which tells what to change, or with the name.
    """
    strange = [name for name, _ in model.named_modules() if not name.isprintable()]
    if strange:
        raise ExportError(
            f"a module is named {strange[0]!a}, and names in an export have printable letters: give it another name"
        )
    generation_config = getattr(model, "generation_config", None) if is_transformers(model) else None
    if generation_config is None:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            generation_config.save_pretrained(folder)
    except ValueError as error:
        raise ExportError(
            f"the model's generation_config cannot be saved, so the model could not: {brief(error)}"
        ) from error


def has_own_code(model: nn.Module) -> bool:
    """True if a transformers model's class comes from code beside its weights (``trust_remote_code``)."""
    return type(model).__module__.partition(".")[0] == "transformers_modules"
