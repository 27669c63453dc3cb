"""All processes that descend from this one, also where the one that started them has ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def adopt() -> None:
    """From here on orphans among them are this process's children, and not lost."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def offspring() -> list[str]:
    """Those that live, as number and name."""
    return [f"{process} {name}" for process, name in _living().items()]


def end_offspring() -> None:
    """Kills them, also those that they start meanwhile."""
    while living := _living():
        for process in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _living() -> dict[int, str]:
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, rest = stat.read_text().split(" (", 1)
            name, _, fields = rest.rpartition(") ")
            state, parent = fields.split()[:2]
            if state != "Z":
                parents[int(number)], names[int(number)] = int(parent), name
    found, more = {os.getpid()}, True
    while more:
        children = {process for process, parent in parents.items() if parent in found} - found
        found |= children
        more = bool(children)
    return {process: names[process] for process in sorted(found - {os.getpid()})}
