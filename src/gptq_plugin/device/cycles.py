"""How often Python looks for cycles of objects: `rarely_collected`, `collect`."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_NEW = 100_000  # objects, between two looks at them; Python's own number is below a thousand
_NEVER = 2**30  # looks at new objects between two at those that stayed
_lock = threading.RLock()  # a collection inside of it may end a block that somebody left open
_before: list[tuple[tuple[int, int, int], bool]] = []  # what was before the first of the blocks now open, for each


@contextlib.contextmanager
def rarely_collected() -> Iterator[None]:
    """Inside the block Python looks for cycles among many new objects only, once, and not among those from before.

    A block of experts is hundreds of modules. Each few of them would have Python look at all objects of the process,
    which takes longer than to quantize the block. Callers who freeze objects, or collect none, keep that. Of blocks
    that overlap, on one thread or several, the last one to end restores what was before the first.
    """
    with _lock:
        if not _before:
            _before.append((gc.get_threshold(), not gc.get_freeze_count()))
            _enter(*_before[0])
        else:
            _before.append(_before[0])
    try:
        yield
    finally:
        with _lock:
            thresholds, freezes = _before.pop()
            if not _before:
                gc.set_threshold(*thresholds)
                if freezes:
                    gc.freeze()  # or what is new would be looked at here, in the caller's next few objects
                    gc.unfreeze()


def _enter(thresholds: tuple[int, int, int], freezes: bool) -> None:
    if freezes:
        gc.freeze()
    if thresholds[0]:
        gc.set_threshold(max(thresholds[0], _NEW), _NEVER, _NEVER)


def collect() -> None:
    """Frees what only cycles refer to, inside of `rarely_collected` too. What callers froze is left alone."""
    with _lock:
        if _is_frozen_here():
            gc.unfreeze()
        gc.collect()
        if _is_frozen_here():  # unless the collection ended the block
            gc.freeze()


def _is_frozen_here() -> bool:
    return bool(_before) and _before[0][1]
