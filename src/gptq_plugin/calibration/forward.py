"""Runs a batch through a model with an arbitrary forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gptq_plugin.calibration.batches import fields_of, to_device
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.hf_models import is_transformers


def call(model: nn.Module, data: Any, *, every_logit: bool = False, device: torch.device | None = None) -> Any:
    """Calls the model on a batch.

    Fields of a mapping, dataclass or named tuple are passed as the keywords that the forward accepts; if they do not
    fit, the batch is passed whole, as a tensor is. Of a tuple or list (inputs, targets, ...) the first element is
    passed. transformers' models compute no cache, no decoder loss and, unless `every_logit`, only the logits of the
    last position.

    Args:
        model: Any module.
        data: The batch.
        every_logit: Compute all logits, since the output embedding is calibrated too.
        device: The batch's destination; None for the device of the model's first parameter.

    Raises:
        CalibrationError: The batch does not fit the forward's signature.
    """
    if device is None:
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else None
    if device is not None:
        data = to_device(data, device)
    signature = inspect.signature(model.forward)
    parts = fields_of(data)
    if parts is not None:
        if accepts(model, parts):
            return model(**_keywords(model, signature, parts, every_logit))
        if _binds(signature, data) and not is_transformers(model):
            return model(data)
    elif isinstance(data, (list, tuple)) and data:
        # In a transformers model's tuple one element may be the attention mask: do not guess.
        if _binds(signature, data[0]) and not (is_transformers(model) and len(data) > 1):
            return model(data[0])
    elif _binds(signature, data):
        return model(data)
    raise CalibrationError(
        f"a calibration batch ({describe(data)}) does not fit {type(model).__name__}.forward{signature}. Give "
        "batches that do, or define how to run one: quantize(..., forward=lambda model, batch: ...), or a "
        "`calibration_step(batch)` method on the LightningModule"
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode inside the block; every module's flag is restored afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def accepts(model: nn.Module, data: Mapping[str, Any]) -> bool:
    """True if the model's forward accepts some of the mapping's keys as keywords, and all it requires."""
    signature = inspect.signature(model.forward)
    keywords = _keywords(model, signature, data, every_logit=False)
    return bool(set(keywords) & set(data)) and _binds(signature, **keywords)


def describe(data: Any) -> str:
    """Describes a batch in a few words, for errors."""
    parts = fields_of(data)
    if parts is not None:
        return "keys " + ", ".join(map(str, parts))
    if isinstance(data, torch.Tensor):
        return f"tensor {tuple(data.shape)} {data.dtype}"
    return type(data).__name__


def _keywords(
    model: nn.Module, signature: inspect.Signature, data: Mapping[str, Any], every_logit: bool
) -> dict[str, Any]:
    parameters = signature.parameters
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    keywords = {k: v for k, v in data.items() if k in parameters or any_keyword}
    if not is_transformers(model):
        return keywords
    keywords = {k: v for k, v in keywords.items() if k in parameters}  # transformers' **kwargs are for kernels
    if not getattr(model.config, "is_encoder_decoder", False):
        keywords.pop("labels", None)
    if "use_cache" in parameters:
        keywords["use_cache"] = False
    if "logits_to_keep" in parameters and not every_logit:
        keywords["logits_to_keep"] = 1
    return keywords


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
