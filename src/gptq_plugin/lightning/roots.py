"""Lightning under its two import roots, `lightning.pytorch` and the older `pytorch_lightning`.

Their code is the same, but a class of one is not a class of the other. A trainer of either root calls the hooks of any
callback, so GPTQCallback works in both, as long as it compares types through `in_any_root`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

_ROOTS = ("lightning.pytorch", "pytorch_lightning")


def overrides(pl_module: Any, hook: str) -> bool:
    """Returns whether the module is a LightningModule, of either root, that overrides this method."""
    roots = [kind for kind in in_any_root("LightningModule") if isinstance(pl_module, kind)]
    return bool(roots) and is_overridden(hook, pl_module, roots[0])


def in_any_root(name: str) -> tuple[type, ...]:
    """Returns the class from every root that this process has imported; objects of another root cannot exist.

    Args:
        name: Dotted, below the root: ``"strategies.FSDPStrategy"``.
    """
    module, _, kind = name.rpartition(".")
    roots = [root for root in _ROOTS if root in sys.modules]
    return tuple(getattr(import_module(f"{root}.{module}" if module else root), kind) for root in roots)
