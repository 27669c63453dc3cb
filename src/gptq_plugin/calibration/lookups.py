"""Explains a lookup beyond a table of embeddings, which PyTorch only calls "index out of range in self"."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gptq_plugin.errors import CalibrationError


@contextlib.contextmanager
def lookups_explained(model: nn.Module) -> Iterator[None]:
    """Raises a CalibrationError for a lookup in the block, of a forward on the CPU, beyond a table of the model.

    A GPU does not tell: there transformers' models are checked before (`takes.check_tokens`).
    """
    try:
        yield
    except IndexError as error:
        lookup = _lookup(error)
        if lookup is None:
            raise
        indices, table = lookup
        name = next((name for name, parameter in model.named_parameters() if parameter is table), "a table")
        least, most = int(indices.min()), int(indices.max())
        raise CalibrationError(
            f"a calibration batch looks up row {least if least < 0 else most} of {name}, which has the rows 0 to "
            f"{len(table) - 1}: its ids are of another vocabulary, or its sequence is longer than the model's positions"
        ) from error


def _lookup(error: IndexError) -> tuple[Tensor, Tensor] | None:
    """Indices and table of the lookup that raised the error; None if it was raised elsewhere."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == "torch.nn.functional" and frame.f_code.co_name == "embedding":
            values: dict[str, Any] = frame.f_locals
            indices, table = values.get("input"), values.get("weight")
            if isinstance(indices, Tensor) and isinstance(table, Tensor) and indices.numel():
                return indices, table
    return None
