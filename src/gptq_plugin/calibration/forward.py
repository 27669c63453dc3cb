"""Runs a batch through a model with an arbitrary forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptq_plugin.calibration.batches import fields_of, to_device
from gptq_plugin.calibration.takes import Takes, check_tokens, fields_taken, receiver
from gptq_plugin.calibration.text_rows import unread_text
from gptq_plugin.device.modules import modules_of
from gptq_plugin.errors import CalibrationError, some
from gptq_plugin.model.hf_models import is_transformers

REMEDY = (
    "Give batches that it takes (`batch_size` is how many samples run together), or define how to run one: "
    "quantize(..., forward=lambda model, batch: ...), or a "
    "`calibration_step(batch)` method on the LightningModule"
)


def call(model: nn.Module, data: Any, *, every_logit: bool = False, device: torch.device | None = None) -> Any:
    """Calls the model on a batch.

    Fields of a mapping, dataclass or named tuple are passed as the keywords that the forward accepts (see
    `takes.fields_taken`); if they do not fit, the batch is passed whole, as a tensor is. Of a tuple or list (inputs,
    targets, ...) the first element is passed. transformers' models compute no cache, no decoder loss and, unless
    `every_logit`, only the logits of the last position.

    Args:
        model: Any module.
        data: The batch.
        every_logit: Compute all logits, since the output embedding is calibrated too.
        device: The batch's destination; None for the device of the model's first parameter. It is copied there: a
            forward may write to it.

    Raises:
        CalibrationError: The batch does not fit the forward's signature, or holds tokens or positions that a
            transformers model does not have.
    """
    if device is None:
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else None
    data = to_device(data, device)
    inner = receiver(model)
    signature = inspect.signature(inner.forward)
    parts = fields_of(data)
    if parts is not None:
        if accepts(model, parts):
            keywords = _keywords(model, parts, every_logit)
            check_tokens(model, keywords)
            return model(**keywords)
        if _binds(signature, data) and not is_transformers(inner):
            return model(data)
    elif isinstance(data, (list, tuple)) and data:
        # In a transformers model's tuple one element may be the attention mask: do not guess.
        if _binds(signature, data[0]) and not (is_transformers(inner) and len(data) > 1):
            return _call_on_first(model, inner, data[0], every_logit)
    elif _binds(signature, data):
        return _call_on_first(model, inner, data, every_logit)
    text = unread_text(data)
    if text:
        raise CalibrationError(text)
    raise CalibrationError(
        f"a calibration batch ({describe(data)}) does not fit {type(inner).__name__}.forward{signature}. {REMEDY}"
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode inside the block; every module's flag is restored afterwards.

    `nn.TransformerEncoder` calls its layers inside: its fused path reads their weights, and packs padded sequences into
    nested tensors, which its layers do not take when they are watched.
    """
    flags = {module: module.training for module in modules_of(model).values()}
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in flags.items():
            module.training = training


def standing_for(forward: Callable[[nn.Module, Any], Any], *parts: Any) -> Callable[[nn.Module, Any], Any]:
    """The forward, with what it depends on beside its code, in place of all that its closure holds.

    Args:
        forward: Runs a batch.
        parts: Models, functions and plain values; see `cache.fingerprint`.
    """
    forward.depends_on = parts  # type: ignore[attr-defined]
    return forward


@dataclass(frozen=True)
class CallsModels:
    """A forward that gives a batch's fields, by `call`, to the first of some modules that accepts them: fields that
    none of them takes may be left out before.

    Attributes:
        run: Runs a batch, called as run(model, batch).
        modules: The modules; none is the model itself.
    """

    run: Callable[[nn.Module, Any], Any]
    modules: Sequence[nn.Module] = ()

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return self.run(model, batch)


def takes_of(model: nn.Module, forward: Callable[[nn.Module, Any], Any] | None) -> Takes:
    """What calibration may give a model.

    Args:
        model: To be quantized.
        forward: Runs a batch; None is `call`. Another than `CallsModels` may read any field.
    """
    if forward is None:
        return Takes.of(model, [model])
    return Takes.of(model, forward.modules or [model] if isinstance(forward, CallsModels) else [])


def accepts(model: nn.Module, data: Mapping[str, Any]) -> bool:
    """True if the model's forward accepts some of the mapping's keys as keywords, and all it requires."""
    keywords = _keywords(model, data, every_logit=False)
    return bool(set(keywords) & set(data)) and _binds(inspect.signature(receiver(model).forward), **keywords)


def describe(data: Any) -> str:
    """Describes a batch in a few words, for errors."""
    parts = fields_of(data)
    if parts is not None:
        return f"keys {some(map(str, parts), 16)}" if parts else "no keys"
    if isinstance(data, torch.Tensor):
        return f"tensor {tuple(data.shape)} {data.dtype}"
    if isinstance(data, (list, tuple)) and data:
        return f"{type(data).__name__} of {len(data)}, the first a {describe(data[0])}"
    return type(data).__name__


def _keywords(model: nn.Module, data: Mapping[str, Any], every_logit: bool) -> dict[str, Any]:
    taken = fields_taken(model)
    keywords = {key: value for key, value in data.items() if taken is None or key in taken}
    if not is_transformers(model):
        return keywords
    if not getattr(model.config, "is_encoder_decoder", False):
        keywords.pop("labels", None)
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        keywords["use_cache"] = False
    if "logits_to_keep" in parameters and not every_logit:
        keywords["logits_to_keep"] = 1
    return keywords


def _call_on_first(model: nn.Module, inner: nn.Module, value: Any, every_logit: bool) -> Any:
    """Calls the model with its first argument, and with no cache and the logits that are needed, as other batches."""
    name = next(iter(inspect.signature(inner.forward).parameters), "")
    check_tokens(inner, {name: value})
    return model(value, **_keywords(model, {}, every_logit))


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
