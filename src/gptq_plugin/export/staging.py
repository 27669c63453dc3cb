"""Makes a folder appear as a whole or not at all: `Staging` is filled beside its target and renamed into place.

A folder that cannot be exchanged for another (`export_dir.works_inside`) is filled in a hidden folder inside it; then
the files are moved one by one, the descriptions last, so that what a kill leaves there is no checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import logging
import os
import shutil
import stat
import time
from pathlib import Path

from gptq_plugin.checkpoint.files import CONFIG, QUANTIZE_CONFIG
from gptq_plugin.errors import ExportError
from gptq_plugin.export.export_dir import check_export_dir, cut, entries, hidden_beside, resolved, works_inside

log = logging.getLogger(__name__)

_YOUNG = 60  # seconds


class Staging:
    """A new hidden folder beside `directory`, or in it; `place` makes it, or its files, those of `directory`.

    Args:
        directory: The target; its parents are created.
        overwrite: Replace an earlier export.

    Raises:
        ExportError: See `check_export_dir`.
    """

    def __init__(self, directory: str | Path, overwrite: bool = False) -> None:
        self.directory = resolved(directory)
        self._overwrite = overwrite
        check_export_dir(self.directory, overwrite)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.directory)
        self.path = hidden_beside(self.directory, "partial")
        self._inside = self.path.parent == self.directory
        self._lock = _make_locked(self.path)

    def place(self) -> None:
        """Flushes all files to the disk, then puts the folder in its target's place.

        Raises:
            ExportError: The target can no longer be used.
        """
        _flush(self.path)
        check_export_dir(self.directory, self._overwrite)  # again: it may have changed
        if self._inside:
            _move_out(self.path, self.directory)
        elif not self.directory.exists():
            self.path.rename(self.directory)
        elif _exchange(self.path, self.directory):
            _remove_earlier(self.path)
        else:
            _step_aside(self.path, self.directory)
        self._unlock()
        _sync(self.directory if self._inside else self.directory.parent)

    def remove(self) -> None:
        """Removes the folder, unless it was placed."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _make_locked(folder: Path) -> int:
    """Makes a folder that is locked from its first moment under that name, and returns the lock's handle."""
    new = folder.with_suffix(".new")
    new.mkdir()
    handle = os.open(new, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
        fcntl.flock(handle, fcntl.LOCK_EX)
    new.rename(folder)
    return handle


def _remove_leftovers(directory: Path) -> None:
    """Removes the hidden folders that killed exports to the same target left: those that no process has locked."""
    start = "" if works_inside(directory) else cut(directory, ".", len(".12345678.partial"))
    folder = directory if works_inside(directory) else directory.parent
    for kind in ("partial", "new"):
        for left in folder.glob(f"{glob.escape(start)}.*.{kind}"):
            with contextlib.suppress(OSError):
                if kind == "new" and time.time() - left.stat().st_mtime < _YOUNG:
                    continue  # its lock may be about to be taken
                handle = os.open(left, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
                    log.warning("removed %s, left by an export that was killed", left)
                finally:
                    os.close(handle)


def _move_out(staging: Path, directory: Path) -> None:
    """Moves the files of a folder inside the target to it, in place of an earlier export's, which is moved back if that
    fails."""
    new, old = sorted(staging.iterdir(), key=_descriptions_last), sorted(entries(directory), key=_descriptions_last)
    aside = hidden_beside(directory, "replaced")
    moves = [*((path, aside / path.name) for path in reversed(old)), *((path, directory / path.name) for path in new)]
    aside.mkdir()
    done = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        aside.rmdir()
        raise
    staging.rmdir()
    shutil.rmtree(aside)


def _descriptions_last(path: Path) -> tuple[bool, str]:
    return path.name in (CONFIG, QUANTIZE_CONFIG), path.name


def _flush(staging: Path) -> None:
    """Flushes all files to the disk and gives them the permissions of new files (safetensors makes its own private).

    A link, such as a tokenizer may leave, becomes the file that it leads to, which is not touched itself.
    """
    mode = stat.S_IMODE((staging / QUANTIZE_CONFIG).stat().st_mode)
    for path in [*staging.rglob("*"), staging]:
        if path.is_symlink() and path.is_file():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ExportError(f"{path.name} of the export is neither a file nor a folder: see who wrote it there")
        if path.is_file():
            path.chmod(mode)
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders atomically, so that a kill at any moment leaves a whole folder under each.
    Returns False if the system or file system cannot (Linux 3.15 and glibc 2.28 can, NFS cannot)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove_earlier(folder: Path) -> None:
    shutil.rmtree(folder)


def _step_aside(staging: Path, directory: Path) -> None:
    """Replaces a folder in two steps: the earlier export is renamed, and renamed back if the second step fails."""
    aside = hidden_beside(directory, "replaced")
    directory.rename(aside)
    try:
        staging.rename(directory)
    except BaseException:
        aside.rename(directory)
        raise
    shutil.rmtree(aside)
