"""What a model takes: the fields of its forward, the positions it has, and the tokens it knows."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from gptq_plugin.calibration.sequences import IGNORED_LABEL
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.hf_models import is_encoder_decoder, is_transformers, transformers_models
from gptq_plugin.model.linears import is_linear


@dataclass(frozen=True)
class Takes:
    """What the models that calibration runs take.

    Attributes:
        name: Of the forward, to follow "fields that".
        fields: Names of their arguments; None if any may be taken.
        longest: Positions that they have; None if that is not limited, or unknown.
        options: Those of the fields that no signature names, such as where packed sequences begin.
    """

    name: str = "the model"
    fields: frozenset[str] | None = None
    longest: int | None = None
    options: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, runners: Iterable[nn.Module]) -> Takes:
        """What a model takes.

        Args:
            model: To be quantized.
            runners: Modules whose forwards may be given a batch, by the names of its fields. If none takes token ids by
                name, a batch is given whole, and any of its fields may be read.
        """
        taken = [_fields(runner) for runner in runners]
        known = [fields for fields in taken if fields is not None]
        if len(known) < len(taken) or not any("input_ids" in named for named, _ in known):
            return cls(f"{type(receiver(model)).__name__}.forward", None, positions_of(model))
        named = frozenset[str]().union(*(own for own, _ in known))
        options = frozenset[str]().union(*(own for _, own in known)) - named
        return cls(f"{type(receiver(model)).__name__}.forward", named | options, positions_of(model), options)


def receiver(module: nn.Module) -> nn.Module:
    """The module whose signature tells what a forward takes: a wrapper with ``forward(*args, **kwargs)`` passes all on
    to the one module in it, or to the one transformers model."""
    while True:
        kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
        if not kinds or kinds - {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return module
        inner = list(module.children())
        if len(inner) != 1:
            inner = [model for _, model in transformers_models(module)]
        if len(inner) != 1:
            return module
        module = inner[0]


def fields_taken(module: nn.Module) -> frozenset[str] | None:
    """Names of the keywords that a module's forward takes; None if it takes any.

    A typed dictionary, which transformers' models annotate their other keywords with, names those too (where packed
    sequences begin, for kernels). Another forward with ``**options`` takes those of the one transformers model in it.
    """
    fields = _fields(module)
    return None if fields is None else frozenset().union(*fields)


def _fields(module: nn.Module) -> tuple[frozenset[str], frozenset[str]] | None:
    """Those names as signatures have them, and as typed dictionaries do; a forward whose other keywords are without one
    has those of the classes that its own derives from."""
    module = receiver(module)
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = frozenset(parameter.name for parameter in parameters if parameter.kind in kinds)
    if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return named, frozenset()
    forwards = (owner.__dict__.get("forward") for owner in type(module).__mro__)
    options = next(filter(None, map(_of_typed_dictionary, (module.forward, *forwards))), frozenset[str]()) - named
    if is_transformers(module):
        return named, options
    inner = [model for _, model in transformers_models(module)]
    more = _fields(inner[0]) if len(inner) == 1 else None
    return None if more is None else (named | more[0], options | more[1])


def _of_typed_dictionary(forward: Any) -> frozenset[str]:
    """Keys of the typed dictionaries that a forward's other keywords are annotated with."""
    try:
        parameters = inspect.signature(forward).parameters.values()
        others = next(p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD)
        hint = others.annotation
        if isinstance(hint, str):
            hint = get_type_hints(forward)[others.name]
    except Exception:  # noqa: BLE001 - no function, no such keywords, or names that only type checkers import
        return frozenset()
    return frozenset(key for part in get_args(hint) if hasattr(part, "__total__") for key in part.__annotations__)


def check_tokens(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuses tokens that a transformers model does not know, and more positions than it has.

    Args:
        module: The model, or a wrapper of it.
        arguments: Those of its call, by name.

    Raises:
        CalibrationError: With the token, or the length, and what the model has.
    """
    model = receiver(module)
    if not is_transformers(model):
        return
    longest = positions_of(model)
    for field, ids in _tokens_in(model, arguments):
        if ids.is_floating_point():
            raise CalibrationError(f"{field} of a calibration batch are {ids.dtype}: token ids are whole numbers")
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            continue  # nothing can be read: a graph is recorded for batches that were run before
        known = _vocabulary(model, decodes=field != "input_ids")
        least, most = (int(value) for value in torch.aminmax(ids))
        if known is not None and (least < 0 or most >= known):
            raise CalibrationError(
                f"a calibration batch holds the token id {least if least < 0 else most} in {field}, and "
                f"{type(model).__name__} has embeddings for the ids 0 to {known - 1}: use the model's own tokenizer, "
                "or call model.resize_token_embeddings(len(tokenizer)) before training if tokens were added"
            )
        if longest is not None and ids.shape[1] > longest:
            raise CalibrationError(
                f"a calibration batch is {ids.shape[1]} positions long ({field}), and {type(model).__name__} has "
                f"{longest}: cut the batches in their collator, or give texts or token lists, which are cut"
            )


def _tokens_in(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Token ids [samples, positions] in a call, by the name of their field."""
    fields = {field: arguments.get(field) for field in ("input_ids", "decoder_input_ids")}
    labels = arguments.get("labels")
    if is_encoder_decoder(model) and isinstance(labels, Tensor) and not labels.is_floating_point():
        fields["labels"] = labels.masked_fill(labels == IGNORED_LABEL, 0)  # become the decoder's tokens
    for field, ids in fields.items():
        if isinstance(ids, Tensor) and ids.dim() == 2 and ids.numel():
            yield field, ids


def positions_of(model: nn.Module) -> int | None:
    """Number of positions that a transformers model, or the one in a module, has a table for; None without one.

    Only where the positions are learned, or computed beforehand: rotary ones are computed for any length.
    """
    models = [inner for _, inner in transformers_models(model)]
    if len(models) != 1:
        return None
    (model,) = models
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    if not isinstance(most, int):
        return None
    return min(_position_tables(model, most), default=None)


def _outside_experts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model but for experts that are apart, of which there may be thousands."""
    yield module
    for child in module._modules.values():
        if child is not None and not getattr(type(child), "keeps_nothing", False):
            yield from _outside_experts(child)


def _position_tables(model: nn.Module, most: int) -> Iterator[int]:
    """Number of positions in every table of positions; some begin with a few rows for other purposes."""
    words = _input_embedding(model)
    for module in _outside_experts(model):
        if isinstance(module, nn.Embedding) and module is not words:
            rows, padding = module.num_embeddings, module.padding_idx
            first = 0 if padding is None else padding + 1
            if most <= rows <= most + 2:
                yield min(most, rows - first)
        elif module._buffers and not is_linear(module):
            buffers = module.buffers(recurse=False)
            if any(buffer.dim() == 2 and len(buffer) == most and buffer.is_floating_point() for buffer in buffers):
                yield most


def _input_embedding(model: Any) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _vocabulary(model: Any, *, decodes: bool) -> int | None:
    """Number of tokens that the model, or its decoder, has embeddings for; None if ids beyond them may be right: some
    stand for images."""
    if decodes:
        model = model.get_decoder()
    elif type(model.config.get_text_config()) is not type(model.config):
        return None
    words = _input_embedding(model)
    if not isinstance(words, nn.Embedding) or hasattr(words, "num_additional_embeddings"):
        return None
    return words.num_embeddings
