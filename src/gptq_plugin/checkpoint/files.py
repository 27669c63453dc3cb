"""The files of a checkpoint: their names, reading and writing JSON, and the description among them."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.options.fields import shown
from gptq_plugin.options.limited_files import parse_json, read_text

CONFIG = "config.json"
QUANTIZE_CONFIG = "quantize_config.json"  # the name AutoGPTQ gave it, read by every tool
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TAKEN_OVER = "taken_over"  # in our part of ``meta``: modules of the files that transformers does not make


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header of its file describes it; `dtype` is safetensors' name, such as ``"F16"``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def description_in(
    model_config: Mapping[str, Any], beside: Mapping[str, Any] | None, directory: Path
) -> tuple[dict[str, Any], Path]:
    """The description of a checkpoint, and the file that holds it: config.json, else quantize_config.json.

    Args:
        model_config: The content of config.json.
        beside: That of quantize_config.json; None if there is none.
        directory: For messages.

    Raises:
        CheckpointError: There is none.
    """
    text_config = model_config.get("text_config") or {}
    inside = model_config.get("quantization_config") or text_config.get("quantization_config")
    if inside is not None:
        return inside, directory / CONFIG
    if beside is not None:
        return {"quant_method": "gptq", **beside}, directory / QUANTIZE_CONFIG
    raise CheckpointError(
        f"{directory} has neither a quantization_config in {CONFIG} nor a {QUANTIZE_CONFIG}, so it is no quantized "
        "checkpoint. A float model is loaded with transformers"
    )


def is_regular(file: Path) -> bool:
    """True for a file, not for a folder, a pipe, a device, or what no file system takes for a name."""
    return os.path.isfile(file)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: The file cannot be read, is larger than any that is written, or holds something else.
    """
    if not is_regular(file):  # reading a pipe would wait for ever
        raise CheckpointError(f"{file} does not exist or is no regular file: fetch it again, or export again")
    try:
        text = read_text(file)
        content = parse_json(text, _without_repeats)
        if "\\u" in text or "NaN" in text:
            _refuse_unusable(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({brief(error)}): fetch it again, or export again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Of a key that occurs twice one reader takes the first value, and another the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it holds {shown(key)} twice")
    return content


def _refuse_unusable(content: Any) -> None:
    """Refuses NaN, which is no value of any configuration (infinity is), and halves of a letter, which print nowhere.

    Raises:
        ValueError: It names the field, dotted.
    """
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{place}.{key}", inside) for key, inside in value.items()]
            waiting += [(f"a name in {place or 'it'}", key) for key in value]
        elif isinstance(value, list):
            waiting += [(f"{place}[{number}]", inside) for number, inside in enumerate(value)]
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{place.lstrip('.')} is NaN")
        elif isinstance(value, str) and not is_printable(value):
            raise ValueError(f"{place.lstrip('.')} has half of a letter (a surrogate)")


def is_printable(text: str) -> bool:
    """False for a text with half of a letter (a surrogate): so Python has a file's name that is no UTF-8, too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
