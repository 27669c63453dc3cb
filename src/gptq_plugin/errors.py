"""The errors users meet. Each message says what happened, in which module, and what to change."""

from __future__ import annotations


class TargetError(ValueError):
    """The model has no layer to quantize, or a layer contradicts the configuration."""


class CalibrationError(ValueError):
    """The calibration set is empty, too short, of an unknown kind, or makes the model produce NaN."""


class CheckpointError(ValueError):
    """A checkpoint on disk is incomplete, corrupt, or contradicts its own description."""


class ExportError(ValueError):
    """The model or the folder cannot be exported to."""
