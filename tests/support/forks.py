"""Forks of the tests' own process: `ending_here`."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator


@contextlib.contextmanager
def ending_here() -> Iterator[None]:
    """Ends a forked process with the block: with an error in it, it would go on as a second run of the tests."""
    code = 1
    try:
        yield
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
