"""Adds a callback to trainers built by other code, through Lightning's entry point for callbacks.

Lightning calls `callbacks` for every Trainer it builds. Outside an `in_every_trainer` block it returns none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_makers: list[Callable[[], Any]] = []


@contextlib.contextmanager
def in_every_trainer(make: Callable[[], Any]) -> Iterator[None]:
    """Adds a callback to each Trainer that is built in the block, of `lightning` and of `pytorch_lightning`.

    Args:
        make: Called once per Trainer; returns a new callback.
    """
    _makers.append(make)
    try:
        yield
    finally:
        _makers.remove(make)


def callbacks() -> list[Any]:
    """The entry point that pyproject.toml names: makes new callbacks for a Trainer."""
    return [make() for make in _makers]
