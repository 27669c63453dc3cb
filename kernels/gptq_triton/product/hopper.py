"""The kernel in Gluon, where this Triton has one that compiles: `gluon`.

Tested by tests/kernels/test_rule.py: by the choice without it.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

from ..needs_triton import triton

log = logging.getLogger(__name__)


@functools.cache
def gluon() -> ModuleType | None:
    """The module `many_rows`; None where this Triton has no Gluon that it compiles with."""
    try:
        from . import many_rows
    except (ImportError, AttributeError) as error:
        log.info("products of many rows are made of a dequantized weight: Triton %s: %s", triton.__version__, error)
        return None
    return many_rows
