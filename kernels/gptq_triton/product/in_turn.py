"""Launches that begin while the product before them on the stream ends: `wait`, `let_go`, `launch`.

Hopper's programmatic dependent launch. A kernel lets the next one go once its last loads are done; that one, if it is
launched so too, waits before it touches memory until the first is over. Behind any other kernel it begins as always.

Tested by tests/kernels/test_products.py: by products of products.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from triton.language.extra.cuda import gdc_launch_dependents as let_go
from triton.language.extra.cuda import gdc_wait as wait

__all__ = ["launch", "let_go", "wait"]


def launch(early: int) -> dict[str, bool]:
    """Options of a kernel's launch."""
    return {"launch_pdl": True} if early else {}
