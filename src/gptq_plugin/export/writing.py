"""Turns what a file system refuses into an ExportError: `writing`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from gptq_plugin.errors import ExportError


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Writes into a folder inside the block.

    Raises:
        ExportError: The disk is full, a quota is used up, or the folder cannot be written to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # transformers' and safetensors' writers raise these as they are
        raise ExportError(
            f"{folder} could not be written: {error}. Make room there, or choose another target, and export again"
        ) from error
