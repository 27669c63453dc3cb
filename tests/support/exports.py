"""Folders that exports wrote, and what may be exported with a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

IDS = torch.tensor([[1, 17, 5, 99, 42, 7, 8, 64]])


class Tokenizer:
    """Saves one file."""

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").write_text("{}")


class BrokenTokenizer:
    """Cannot be saved."""

    def save_pretrained(self, directory: Path) -> None:
        raise RuntimeError("no space left on device")


def logits(model: Any) -> torch.Tensor:
    """Of a language model, or of `models.Plain`."""
    with torch.no_grad():
        result = model(input_ids=IDS) if hasattr(model, "config") else model(IDS % 32)
    return getattr(result, "logits", result)


def description(folder: Path) -> dict[str, Any]:
    """The quantization_config in config.json."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
