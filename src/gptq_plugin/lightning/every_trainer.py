"""A callback for trainers that somebody else's code builds, through Lightning's entry point for callbacks.

Lightning asks `callbacks` for every Trainer it builds. Outside of an `in_every_trainer` block there are none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_asked_for: list[Callable[[], Any]] = []


@contextlib.contextmanager
def in_every_trainer(make: Callable[[], Any]) -> Iterator[None]:
    """Adds a callback to each Trainer that is built in the block, of `lightning` and of `pytorch_lightning`.

    Args:
        make: Called for each Trainer; returns a new callback.
    """
    _asked_for.append(make)
    try:
        yield
    finally:
        _asked_for.remove(make)


def callbacks() -> list[Any]:
    """What pyproject.toml names as the entry point: new callbacks for a Trainer, none unless asked for."""
    return [make() for make in _asked_for]
