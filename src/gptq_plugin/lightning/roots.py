"""Lightning under its two import roots, `lightning.pytorch` and the older `pytorch_lightning`.

A class of one is not a class of the other, though they are the same code. A trainer of either root calls the hooks of
any callback, so GPTQCallback serves both, as long as nothing asks whether a strategy is of one root's classes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

_ROOTS = ("lightning.pytorch", "pytorch_lightning")


def overrides(pl_module: Any, hook: str) -> bool:
    """Whether the module is a LightningModule of either root that has this method of its own."""
    roots = [kind for kind in in_any_root("LightningModule") if isinstance(pl_module, kind)]
    return bool(roots) and is_overridden(hook, pl_module, roots[0])


def in_any_root(name: str) -> tuple[type, ...]:
    """The class in every root this process has imported; an object of another root cannot be in it.

    Args:
        name: Dotted, below the root: ``"strategies.FSDPStrategy"``.
    """
    module, _, kind = name.rpartition(".")
    roots = [root for root in _ROOTS if root in sys.modules]
    return tuple(getattr(import_module(f"{root}.{module}" if module else root), kind) for root in roots)
