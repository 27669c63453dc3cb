"""The tokenizer that users give: an object, or the folder or hub id to load it from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gptq_plugin.errors import brief
from gptq_plugin.options import fields
from gptq_plugin.options.limited_files import check_sizes

_REMEDY = (
    "Give a transformers tokenizer, or the folder or hub id to load it from; a tokenizer of the `tokenizers` library "
    "is wrapped by transformers.PreTrainedTokenizerFast(tokenizer_object=...)"
)


def as_tokenizer(given: Any, *, saved: bool = False) -> Any:
    """Returns the tokenizer, loaded if a folder or hub id is given; None if None is given.

    Args:
        given: A transformers tokenizer or processor, a function from text to tokens, a folder, or a hub id.
        saved: It is to be saved with an export, which a plain function cannot be.

    Raises:
        ValueError: No tokenizer can be loaded from that folder or hub id.
        TypeError: `given` is not a tokenizer, or cannot be saved.
    """
    if given is None:
        return None
    if isinstance(given, (str, os.PathLike)):
        return _load(given)
    if _is_savable(given):
        return given
    reason = _reason_against(given)
    if reason:
        raise TypeError(f"tokenizer={_brief(given)} is not a tokenizer: {reason}. {_REMEDY}")
    if saved:
        raise TypeError(
            f"tokenizer={_brief(given)} has no save_pretrained, so it cannot be saved with the export: give a "
            "transformers tokenizer; or leave it out, and give token lists instead of texts"
        )
    return given


def _load(name_or_path: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    try:
        name_or_path = os.fspath(name_or_path)
    except Exception as error:
        raise ValueError(f"tokenizer={_brief(name_or_path)} tells no path: {brief(error)}. {_REMEDY}") from error
    try:
        check_sizes(name_or_path)
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:
        kind = "a folder without a tokenizer" if os.path.isdir(name_or_path) else "neither a folder nor a hub id"
        raise ValueError(
            f"tokenizer={fields.shown(str(name_or_path))} is {kind} that transformers.AutoTokenizer can load: "
            f"{brief(error)}. If its options are needed (trust_remote_code, revision), load it yourself and give it"
        ) from error


def _is_savable(given: Any) -> bool:
    """True for tokenizers and processors of transformers, and what is like them; models and configurations, which have
    `save_pretrained` too, are not."""
    if isinstance(given, (type, nn.Module)) or not callable(getattr(given, "save_pretrained", None)):
        return False
    return not hasattr(given, "to_diff_dict")  # configurations


def _reason_against(given: Any) -> str:
    """Why a text cannot be encoded by calling `given`; empty if it can."""
    if isinstance(given, type):
        return "it is a class, not an object of it"
    if isinstance(given, nn.Module):
        return "it is a model"
    if not callable(given):
        return "it cannot be called on a text"
    try:
        tokens = given("A text.")
    except Exception as error:  # noqa: BLE001  any object, called to find out
        return f"called on a text it raised {type(error).__name__}: {brief(error)}"
    ids = tokens.get("input_ids") if isinstance(tokens, Mapping) else tokens
    if isinstance(ids, Tensor):
        found = ids.dim() > 0 and not ids.is_floating_point()
    else:
        found = isinstance(ids, (list, tuple)) and all(isinstance(row, (int, list)) for row in ids)
    return "" if found else f"called on a text it returned {_brief(tokens)} instead of token ids"


def _brief(value: Any) -> str:
    shown = fields.shown(value)
    return shown if len(shown) <= 60 else f"<{type(value).__name__}>"
