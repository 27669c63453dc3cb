"""Which modules of a tree are transformers models. Nothing here imports transformers."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

from torch import nn

from gptq_plugin.errors import ExportError

# model_type of the architectures whose layers are transformers' Conv1D, which is no nn.Linear.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")


def is_transformers(module: nn.Module) -> bool:
    """Whether it is a transformers model; without transformers in the process there can be none."""
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    return kind is not None and isinstance(module, kind)


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether it is a transformers model that reads one sequence and writes another."""
    return is_transformers(module) and bool(getattr(module.config, "is_encoder_decoder", False))


def predicts_next(module: nn.Module) -> bool:
    """Whether position i predicts label i + 1, because the model's own loss shifts the labels.

    That is so for transformers' decoders that generate. Encoder-decoders shift their inputs instead, heads for masked
    tokens or classes of tokens shift nothing, and a model without a head has no loss.
    """
    return generates(module) and not is_encoder_decoder(module)


def generates(module: nn.Module) -> bool:
    """Whether it is a transformers model that writes sequences."""
    return is_transformers(module) and bool(module.can_generate())  # type: ignore[operator]


def transformers_models(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost transformers models in a tree, with their dotted names."""
    if is_transformers(root):
        yield prefix, root
        return
    for name, child in root.named_children():
        yield from transformers_models(child, f"{prefix}.{name}" if prefix else name)


def published_class(model: nn.Module) -> type | None:
    """The class of transformers that a transformers model is, or that a user's subclass of it (a LightningModule, say)
    comes from; None for an architecture that transformers does not have."""
    library = sys.modules["transformers"]
    for kind in type(model).__mro__:
        if getattr(library, kind.__name__, None) is kind:
            # What every model comes from, and the abstract bases of the families, are no architecture.
            return None if kind.__name__.endswith("PreTrainedModel") else kind
    return None


def check_savable(model: nn.Module) -> None:
    """Says now whether a model's generation config can be saved; transformers refuses one that was changed and
    contradicts itself, which would otherwise be found at the end.

    Raises:
        ExportError: It cannot; the message is transformers', which says what to change.
    """
    generation_config = getattr(model, "generation_config", None) if is_transformers(model) else None
    if generation_config is None:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            generation_config.save_pretrained(folder)
    except ValueError as error:
        raise ExportError(f"the model's generation_config cannot be saved, so the model could not: {error}") from error


def has_own_code(model: nn.Module) -> bool:
    """Whether a transformers model's class comes from code beside its weights (``trust_remote_code``)."""
    return type(model).__module__.partition(".")[0] == "transformers_modules"
