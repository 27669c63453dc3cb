"""Layers of a kind, which blocks of one model have in common: `kind_of`."""

from __future__ import annotations

import re


def kind_of(name: str) -> str:
    """The name of a module with a star for each number between dots: ``layers.*.fc1``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
