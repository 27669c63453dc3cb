"""Errors for users. Each message tells what happened, in which module, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class TargetError(ValueError):
    """The model has no layer to quantize, or a layer contradicts the configuration."""


class CalibrationError(ValueError):
    """Calibration data is missing, too short, of an unknown kind, or makes the model produce NaN."""


class CheckpointError(ValueError):
    """A checkpoint on disk is incomplete, corrupt, or contradicts its own description."""


class ExportError(ValueError):
    """The model cannot be exported, or not to this folder."""


class RankError(RuntimeError):
    """Another rank of the process group failed, was lost, or is out of step."""


class DataError(ValueError):
    """Text for training, calibration or evaluation is missing, empty or too short, or lacks the column."""


class QualityError(ValueError):
    """The quantized model is worse than the limits allow."""


OF_USERS = (TargetError, CalibrationError, CheckpointError, ExportError, RankError, DataError, QualityError)


def brief(text: object, most: int = 600) -> str:
    """A value's or an error's text for a message: cut to its first `most` letters, and with escapes for what cannot be
    printed. Files of strangers end up in it."""
    whole = str(text).encode(errors="backslashreplace").decode()
    return whole if len(whole) <= most else f"{whole[:most]}…"


def lines(problems: Sequence[str], most: int = 20) -> str:
    """The first `most` of several problems, a line each, and the number of others, for a message."""
    more = [f"and {len(problems) - most} more like these"] if len(problems) > most else []
    return "".join(f"\n  {problem}" for problem in [*problems[:most], *more])


def some(names: Iterable[str], most: int = 4) -> str:
    """The first `most` names of a list, each cut, and the number of others, for a message."""
    listed = [brief(name, 200) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
