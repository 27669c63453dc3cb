"""Where a LightningModule's `log` and `log_dict` go: `logging_to`.

Tested by tests/lightning/test_validation.py: with what a `validation_step` logs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl


@contextlib.contextmanager
def logging_to(pl_module: pl.LightningModule, log: Callable[..., Any], log_dict: Callable[..., Any]) -> Iterator[None]:
    """Replaces the module's `log` and `log_dict` inside the block."""
    replaced = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    pl_module.__dict__.update(log=log, log_dict=log_dict)
    try:
        yield
    finally:
        for name, before in replaced.items():
            del pl_module.__dict__[name]
            if before is not None:
                pl_module.__dict__[name] = before
