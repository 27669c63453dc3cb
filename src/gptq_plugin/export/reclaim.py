"""Clears up behind exports that were killed: `reclaim`.

A killed process leaves its hidden folders unlocked. What was being written is removed. An export that was killed while
it took an earlier one's place is undone or completed, by the name of the folder that holds the earlier one:

- ``replaced``, beside the target: the earlier export, which gets its name back unless the new one has it.
- ``leaving``, inside the target: some files of the earlier export, which are moved back.
- ``replaced``, inside the target: the whole earlier export. The new one, complete and verified, was on its way out of
  its own hidden folder, and is moved on.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path

from gptq_plugin.checkpoint.files import CONFIG, QUANTIZE_CONFIG
from gptq_plugin.export.hidden_folders import LEAVING, PARTIAL, REPLACED, UNSHARDED, entries, hidden_folders, locked

log = logging.getLogger(__name__)

_PATIENCE = 10  # seconds that a living process may take to exchange two exports


def reclaim(directory: Path) -> None:
    """Clears up behind exports to this folder that were killed.

    Leaves what living processes work on, and everything where the file system has no locks.

    Args:
        directory: The target, absolute, existing or not.
    """
    for aside in _all(directory, LEAVING, REPLACED):
        with contextlib.suppress(OSError):
            _reclaim_earlier(aside, directory)
    for left in _all(directory, PARTIAL, UNSHARDED):
        with contextlib.suppress(OSError), locked(left) as held:
            if held:
                shutil.rmtree(left)
                log.warning("removed %s, left by a run that was killed", left)


def descriptions_last(path: Path) -> tuple[bool, str]:
    """Sorts files of an export so that whatever comes before the last is no checkpoint."""
    return path.name in (CONFIG, QUANTIZE_CONFIG), path.name


def _all(directory: Path, *kinds: str) -> list[Path]:
    return [folder for kind in kinds for folder in hidden_folders(directory, kind)]


def _reclaim_earlier(aside: Path, directory: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while aside.exists():
        with locked(aside) as held:
            if held:
                _settle(aside, directory)
                return
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _settle(aside: Path, directory: Path) -> None:
    inside, staging = aside.parent == directory, aside.with_suffix(f".{PARTIAL}")
    if inside and aside.suffix == f".{LEAVING}":
        _move_all(aside, directory)
        log.warning("put back the export in %s, which an export that was killed had begun to replace", directory)
    elif inside and staging.exists():
        with locked(staging) as held:
            if not held:
                return
            _move_all(staging, directory)
        shutil.rmtree(aside)
        log.warning("completed the export in %s, which was killed while it took an earlier one's place", directory)
    elif (directory / QUANTIZE_CONFIG).exists():
        shutil.rmtree(aside)
        log.warning("removed %s, which an export that was killed had replaced", aside)
    elif inside and not entries(directory):
        _move_all(aside, directory)
    elif not inside and not (directory.exists() and entries(directory)):
        aside.rename(directory)
        log.warning("put back the export in %s, which an export that was killed had begun to replace", directory)


def _move_all(source: Path, directory: Path) -> None:
    """Moves what lies in a hidden folder to the target, where nothing has that name, and removes the empty folder."""
    for path in sorted(source.iterdir(), key=descriptions_last):
        if not (directory / path.name).exists():
            path.rename(directory / path.name)
    source.rmdir()
