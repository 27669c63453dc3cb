"""The files of a checkpoint: their names, the description among them, and which of them hold the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_plugin.errors import CheckpointError, some

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


def description_in(directory: Path, model_config: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The description of a checkpoint, and the file that holds it: config.json, else quantize_config.json.

    Raises:
        CheckpointError: There is none, or it is no JSON object.
    """
    text_config = model_config.get("text_config") or {}
    inside = model_config.get("quantization_config") or text_config.get("quantization_config")
    beside = directory / QUANTIZE_CONFIG
    if inside is not None:
        quantization, source = inside, directory / CONFIG
    elif beside.is_file():
        quantization, source = {"quant_method": "gptq", **read_json(beside)}, beside
    else:
        raise CheckpointError(
            f"{directory} has neither a quantization_config in {CONFIG} nor a {QUANTIZE_CONFIG}, so it is no quantized "
            "checkpoint. A float model is loaded with transformers"
        )
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{source}: the quantization description must be an object, got {quantization!r}")
    return quantization, source


def weight_files(directory: Path, quantization: Mapping[str, Any]) -> dict[Path, list[str]]:
    """The safetensors files, each with the tensors that an index lists for it.

    Raises:
        CheckpointError: There is not one file or one index, or the index is damaged.
    """
    indices = (
        [directory / INDEX] if (directory / INDEX).is_file() else sorted(directory.glob("*.safetensors.index.json"))
    )
    if indices and not (directory / WEIGHTS).is_file():
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{indices[0]} has no weight_map: fetch it again, or export the model again")
        files: dict[Path, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(
                    f"{indices[0]} lists {name} in {shard!r}, which is not the name of a file of this folder: fetch it "
                    "again, or export the model again"
                )
            files.setdefault(directory / shard, []).append(name)
        return files
    base = quantization.get("model_file_base_name") or "model"
    named = directory / f"{base}.safetensors"
    found = [named] if named.is_file() else sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{directory} should hold its weights in one {WEIGHTS}, or in shards listed by {INDEX}; it has "
            f"{some(file.name for file in found) or 'no safetensors file'}"
        )
    return {found[0]: []}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}): fetch it again, or export again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
