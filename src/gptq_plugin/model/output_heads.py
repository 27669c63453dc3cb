"""Finds the layers that give a classifier's output: like an output embedding they stay float unless `lm_head` is set.

A transformers model tells its output embedding (`Structure.head`). Other tasks have a head behind the model that reads,
and its last layer is the output. Without a transformers model nothing tells an output from any other layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from gptq_plugin.model.hf_models import generates, transformers_models


def output_heads(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> set[str]:
    """Names of the output layers of transformers classifiers, and of what users put behind a model without a head.

    Outside the model that reads, these are the last layers of each part: those with as many outputs as there are
    labels, or all if none has so many. A user's parts count if they are registered behind that model.

    Args:
        model: Any module.
        shapes: (out_features, in_features) of its linear layers by name, in the order they are registered.
    """
    found: set[str] = set()
    for name, whole in transformers_models(model):
        if generates(whole) or _has_output_embedding(whole):
            continue
        readers = [reader for child, part in whole.named_children() for reader, _ in transformers_models(part, child)]
        if readers:
            prefix = f"{name}." if name else ""
            readers = [prefix + reader for reader in readers]
            head = [layer for layer in shapes if layer.startswith(prefix) and not _is_inside(layer, readers)]
            labels = getattr(whole.config, "num_labels", None)  # type: ignore[union-attr]
            last = _last_of_each(head, readers)
            found.update([layer for layer in last if shapes[layer][0] == labels] or last)
        elif name:
            others = [other for other, _ in transformers_models(model)]
            order = {module: number for number, (module, _) in enumerate(model.named_modules())}
            head = [layer for layer in shapes if not _is_inside(layer, others) and order[layer] > order[name]]
            found.update(_last_of_each(head, [name]))
    return found


def _has_output_embedding(model: nn.Module) -> bool:
    try:
        return isinstance(model.get_output_embeddings(), nn.Module)  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return False


def _is_inside(layer: str, modules: Iterable[str]) -> bool:
    return any(layer.startswith(f"{module}.") for module in modules)


def _last_of_each(layers: Iterable[str], readers: Iterable[str]) -> list[str]:
    """The last layer of each part beside the readers: of each child of the module that holds them, say."""
    last: dict[tuple[str, ...], str] = {}
    for layer in layers:
        parts = layer.split(".")
        shared = max(_common(parts, reader.split(".")) for reader in readers)
        last[tuple(parts[: shared + 1])] = layer
    return list(last.values())


def _common(one: list[str], other: list[str]) -> int:
    """Number of parts with which both names begin."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
