"""Which modules of a tree are transformers models. Nothing here imports transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn


def is_transformers(module: nn.Module) -> bool:
    """Whether it is a transformers model; without transformers in the process there can be none."""
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    return kind is not None and isinstance(module, kind)


def transformers_models(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost transformers models in a tree, with their dotted names."""
    if is_transformers(root):
        yield prefix, root
        return
    for name, child in root.named_children():
        yield from transformers_models(child, f"{prefix}.{name}" if prefix else name)
