"""The errors users meet. Each message says what happened, in which module, and what to change."""

from __future__ import annotations

from collections.abc import Iterable


class TargetError(ValueError):
    """The model has no layer to quantize, or a layer contradicts the configuration."""


class CalibrationError(ValueError):
    """The calibration set is empty, too short, of an unknown kind, or makes the model produce NaN."""


class CheckpointError(ValueError):
    """A checkpoint on disk is incomplete, corrupt, or contradicts its own description."""


class ExportError(ValueError):
    """The model or the folder cannot be exported to."""


class RankError(RuntimeError):
    """Another rank of the process group failed, was lost, or does something else."""


class DataError(ValueError):
    """The text to train, calibrate or evaluate on is missing, empty, too short, or has no such column."""


class QualityError(ValueError):
    """The quantized model is further from the float one than was allowed."""


def some(names: Iterable[str], most: int = 4) -> str:
    """The first names of a list that may be long, for a message."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
