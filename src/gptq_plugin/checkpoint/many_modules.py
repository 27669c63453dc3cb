"""Compares the numbers of layers, blocks and experts in config.json with the files, before a model is built.

Tested by tests/checkpoint/test_load.py: before a model is built; by tests/hf/test_quantizer.py through transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptq_plugin.checkpoint.files import TensorEntry
from gptq_plugin.errors import CheckpointError, brief

# Keys of config.json.
_COUNTS = re.compile(r"^(num|n)_.*(layer|block|expert|stage)|(layer|depth|block|expert|stage)s?$")
_MANY = 1024  # layers, or experts, that are built in a second or two


def refuse_many_modules(config: Mapping[str, Any], file: Path, tensors: Iterable[TensorEntry]) -> None:
    """Refuses more modules than the files can hold: building them takes hours.

    Args:
        config: The content of config.json.
        file: It, for the message.
        tensors: Those in the files.

    Raises:
        CheckpointError: It names the field.
    """
    shapes = [entry.shape for entry in tensors]
    _refuse(config, file, len(shapes), max(_MANY, len(shapes), *(shape[0] for shape in shapes if len(shape) > 2)))


def _refuse(config: Mapping[str, Any], file: Path, tensors: int, most: int) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse(value, file, tensors, most)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and number > most and _COUNTS.search(key):
                raise CheckpointError(
                    f"{file}: {key} is {brief(number, 40)}, and the files hold {tensors} tensors: correct it, or fetch "
                    "the checkpoint again"
                )
