"""The files of a checkpoint: their names, reading and writing JSON, and the description among them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_plugin.errors import CheckpointError

CONFIG = "config.json"
QUANTIZE_CONFIG = "quantize_config.json"  # the name AutoGPTQ gave it, read by every tool
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
        CheckpointError: The file cannot be read, or holds something else.
    """
    if not is_regular(file):  # reading a pipe would wait for ever
        raise CheckpointError(f"{file} does not exist or is no regular file: fetch it again, or export again")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=_constant)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # halves of a letter cannot be printed
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}): fetch it again, or export again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _constant(name: str) -> float:
    """Infinity, which the limits of some configurations are; NaN is no value of any."""
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
