"""Text in calibration data: plain texts, rows of a data set with a column of text, and chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import Tensor
from torch.utils._pytree import tree_leaves

from gptq_plugin.errors import CalibrationError, brief, some

# The columns of a row that may hold its text, in the order they are tried.
COLUMNS = ("messages", "text")


def encoded(item: Any, tokenizer: Callable[..., Any] | None) -> Any:
    """The tokens of a text, a row with a text, or a chat; anything else without its metadata, or unchanged.

    Args:
        item: A text; a mapping with a column ``text`` or ``messages``, such as a row of a `datasets.Dataset`; a chat,
            which is a list of messages ``{"role": ..., "content": ...}``; a row that is tokenized already, whose
            columns of plain strings and numbers are left out; or any other sample or batch.
        tokenizer: Called as tokenizer(text); of a processor, its tokenizer. Chats go through the chat template, which
            sets all special tokens.

    Raises:
        CalibrationError: There is no tokenizer for a text, or no chat template for a chat, or it refuses the chat; or
            a chat is given where chats are.
    """
    if _is_message(item):
        raise CalibrationError(
            f"calibration data holds a single message (of {item['role']}), not chats: give a list of chats, [messages]"
        )
    if _is_tokenized_row(item):
        return {key: value for key, value in item.items() if not _is_metadata(value)}
    text = item
    if _is_text_row(item):
        text = next((item[key] for key in COLUMNS if is_text(item.get(key))), None)
        if text is None:
            return []  # an empty sample
    if not is_text(text):
        return item
    if tokenizer is None:
        what = "texts" if isinstance(text, str) else "chat messages"
        raise CalibrationError(f"calibration data holds {what}, and there is no tokenizer for them: give tokenizer=...")
    encode = _of_text(tokenizer)
    if isinstance(text, str):
        return encode(text)
    tools = item.get("tools") if isinstance(item, Mapping) else None
    return encode(render_chat(text, tokenizer, tools), add_special_tokens=False)


def is_text(value: Any) -> bool:
    """True for a text and for a chat."""
    return isinstance(value, str) or is_chat(value)


def unread_text(data: Any) -> str:
    """A sentence about data with texts that no model takes: rows whose text is in other columns, or a loader's batch of
    texts; empty for other data, such as with tensors."""
    leaves = tree_leaves(dict(data)) if isinstance(data, Mapping) else []
    if not any(isinstance(leaf, str) for leaf in leaves) or any(isinstance(leaf, Tensor) for leaf in leaves):
        return ""
    if any(key in data for key in COLUMNS):
        return (
            "a calibration batch holds texts, put together by a DataLoader: give the data set itself, or a list of "
            "texts; or define how to run a batch of texts: forward=, or a `calibration_step` of the LightningModule"
        )
    return (
        f"a row of the calibration data has {some(map(str, data), 8)}, and its text is read from a column text, or "
        "messages: rename the one that holds it (data.rename_column(NAME, 'text')), or give a list of texts"
    )


def is_chat(value: Any) -> bool:
    """True for a list of messages, each a mapping with a role and a content, or for its columns as `datasets` gives
    them: ``{"role": [...], "content": [...]}``."""
    if isinstance(value, Mapping):
        return all(isinstance(value.get(key), list) for key in ("role", "content"))
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)
    )


def render_chat(messages: Any, tokenizer: Any, tools: Any = None) -> str:
    """The text that the tokenizer's chat template makes of a chat, with its special tokens.

    Args:
        messages: A chat; see `is_chat`.
        tokenizer: A transformers tokenizer or processor with a chat template.
        tools: The functions that the assistant may call, as transformers' templates take them, or as JSON; None is
            none.

    Raises:
        CalibrationError: There is no template, or it refuses the chat.
    """
    template = next((one for one in (tokenizer, _of_text(tokenizer)) if getattr(one, "chat_template", None)), None)
    if template is None:
        raise CalibrationError(
            "the data holds chat messages, and the tokenizer has no chat template: take the tokenizer of the model "
            "that was tuned for chat, or set tokenizer.chat_template; or give texts"
        )
    if isinstance(messages, Mapping):
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    chat = _without_none(messages)
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
        rendered: str = template.apply_chat_template(chat, tools=tools or None, tokenize=False)
    except Exception as error:
        roles = some(str(message["role"]) for message in chat)
        raise CalibrationError(f"the tokenizer's chat template refuses a chat of {roles}: {brief(error)}") from error
    return rendered


def _is_message(item: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(item, Mapping) and isinstance(item.get("role"), str) and "content" in item


def _of_text(tokenizer: Any) -> Any:
    """What encodes texts: a processor's tokenizer, since its own first argument is images; else the tokenizer."""
    from transformers import ProcessorMixin

    return (
        tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) and hasattr(tokenizer, "tokenizer") else tokenizer
    )


def _is_tokenized_row(item: Any) -> TypeGuard[Mapping[str, Any]]:
    """True for the tokens of one sample with metadata, such as its text, beside them."""
    if not isinstance(item, Mapping) or not any(map(_is_metadata, item.values())):
        return False
    ids = item.get("input_ids")
    return ids.dim() == 1 if isinstance(ids, Tensor) else isinstance(ids, list)


def _is_text_row(item: Any) -> TypeGuard[Mapping[str, Any]]:
    """True for a mapping with a text or a chat, perhaps missing or empty, and no tensors for the model."""
    return (
        isinstance(item, Mapping)
        and "input_ids" not in item
        and any(is_text(item[key]) or item[key] is None or item[key] == [] for key in COLUMNS if key in item)
        and not any(isinstance(value, Tensor) and value.dim() for value in item.values())
    )


def _without_none(value: Any) -> Any:
    """Without the keys that a row lacks: tables fill them with None, where templates ask whether they are there."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, (list, tuple)) else value


def _is_metadata(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float))
