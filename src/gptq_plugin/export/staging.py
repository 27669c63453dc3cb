"""Makes a folder appear as a whole or not at all: `Staging` is filled beside its target and renamed into place.

A folder that cannot be exchanged for another (`hidden_folders.works_inside`) is filled in a hidden folder inside it;
then the files are moved one by one, the descriptions last, so that what a kill leaves there is no checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import stat
from pathlib import Path

from gptq_plugin.checkpoint.files import QUANTIZE_CONFIG
from gptq_plugin.errors import ExportError, brief, some
from gptq_plugin.export.disk_space import UNSUPPORTED, flush
from gptq_plugin.export.export_dir import check_export_dir, resolved
from gptq_plugin.export.hidden_folders import (
    LEAVING,
    PARTIAL,
    REPLACED,
    HiddenFolder,
    entries,
    hidden_beside,
    hidden_name,
    locked,
)
from gptq_plugin.export.reclaim import descriptions_last

log = logging.getLogger(__name__)


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
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._folder = HiddenFolder(hidden_beside(self.directory, PARTIAL))
        except OSError as error:
            raise ExportError(f"cannot create {self.directory}: {brief(error)}; choose another folder") from error

    @property
    def path(self) -> Path:
        """The hidden folder."""
        return self._folder.path

    def flush(self) -> None:
        """Flushes all files to the disk, before `place`.

        Raises:
            ExportError: Something is neither a file nor a folder.
        """
        _flush(self.path)

    def place(self) -> None:
        """Puts the folder in its target's place. Nothing fails once it is there.

        Raises:
            ExportError: The target can no longer be used.
        """
        check_export_dir(self.directory, self._overwrite)  # again: it may have changed
        if not self._is_inside() and not self._is_exchanged():
            self._folder.move(self.directory / hidden_name(PARTIAL))
        is_inside = self._is_inside()
        if is_inside:
            _move_out(self.path, self.directory)
        self._folder.release()
        try:
            _sync(self.directory if is_inside else self.directory.parent)
        except OSError as error:
            log.warning("%s is in place, and the disk may not keep it: %s", self.directory, error)

    def _is_inside(self) -> bool:
        return self.path.parent == self.directory

    def _is_exchanged(self) -> bool:
        """Puts the folder in its target's place; False if the file system cannot rename that one: an overlay, such as a
        container's, cannot if it is part of the image."""
        if not self.directory.exists():
            self.path.rename(self.directory)
        elif _exchange(self.path, self.directory):
            _remove_earlier(self.path)
        else:
            try:
                _step_aside(self.path, self.directory)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                return False
        return True

    def remove(self) -> None:
        """Removes the folder, unless it was placed, or is half-way to it: the next export then completes that."""
        if self.path.with_suffix(f".{REPLACED}").exists():
            self._folder.release()
        else:
            self._folder.remove()


def _move_out(staging: Path, directory: Path) -> None:
    """Moves the files of a folder inside the target to it, in place of an earlier export's, which is moved back if that
    fails.

    The folder that the earlier ones are moved to has another name from when all are there: see `reclaim`.
    """
    new, old = sorted(staging.iterdir(), key=descriptions_last), sorted(entries(directory), key=descriptions_last)
    leaving, replaced = staging.with_suffix(f".{LEAVING}"), staging.with_suffix(f".{REPLACED}")
    moves = [(path, leaving / path.name) for path in reversed(old)]
    moves += [(leaving, replaced), *((path, directory / path.name) for path in new)]
    aside = HiddenFolder(leaving)
    try:
        try:
            _rename_all(moves)
        except BaseException:
            if not any(leaving.iterdir()):
                leaving.rmdir()
            raise
        with contextlib.suppress(OSError):
            staging.rmdir()
        _remove_earlier(replaced)
    finally:
        aside.release()


def _rename_all(moves: list[tuple[Path, Path]]) -> None:
    """Renames one path after the other, and all back if one cannot be."""
    done = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _flush(staging: Path) -> None:
    """Flushes all files to the disk and gives them the permissions of new files (safetensors makes its own private).

    A link, such as a tokenizer may leave, becomes the file that it leads to, which is not touched itself. A file system
    that has no permissions of its own keeps those that it shows.
    """
    kept = []
    mode = stat.S_IMODE((staging / QUANTIZE_CONFIG).stat().st_mode)
    for path in [*staging.rglob("*"), staging]:
        if path.is_symlink() and path.is_file():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ExportError(f"{path.name} of the export is neither a file nor a folder: see who wrote it there")
        if path.is_file():
            try:
                path.chmod(mode)
            except OSError as error:
                if error.errno not in (errno.EPERM, *UNSUPPORTED):
                    raise
                kept.append(path.name)
        _sync(path)
    if kept:
        log.warning("the file system does not let permissions be set, so others may not read %s", some(kept))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders atomically, so that a kill at any moment leaves a whole folder under each.
    Returns False if the system or file system cannot (Linux 3.15 and glibc 2.28 can, NFS cannot)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove_earlier(folder: Path) -> None:
    """Removes a replaced export. What cannot be removed is left to the next export: the new one is in place."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("the export that was replaced is still there as %s, and could not be removed: remove it", folder)


def _step_aside(staging: Path, directory: Path) -> None:
    """Replaces a folder in two steps: the earlier export is renamed, and renamed back if the second step fails."""
    aside = staging.with_suffix(f".{REPLACED}")
    with locked(directory):
        _rename_all([(directory, aside), (staging, directory)])
        _remove_earlier(aside)
