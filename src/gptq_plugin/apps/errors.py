"""The error of unusable text, in the applications."""

from __future__ import annotations


class DataError(ValueError):
    """The text to train, calibrate or evaluate on is missing, empty, too short, or has no such column."""
