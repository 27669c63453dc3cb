"""Makes a folder appear as a whole or not at all: `Staging` is filled beside its target and renamed into place.

Only an earlier export is ever replaced. It is recognized by the list of its files in quantize_config.json.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import logging
import os
import shutil
import stat
import time
import uuid
from pathlib import Path

from gptq_plugin.checkpoint.files import QUANTIZE_CONFIG, read_json
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.errors import ExportError

log = logging.getLogger(__name__)

_YOUNG = 60  # seconds
_LONGEST_PATH = 4095 - 256  # bytes; the rest is for the hidden name and the files in it


def check_export_dir(directory: str | Path, overwrite: bool = False) -> None:
    """Checks, before any training or quantization, that `export_model` could write to `directory`.

    Args:
        directory: The target folder.
        overwrite: An earlier export of this package may be replaced.

    Raises:
        ExportError: It is a file, is not ours, holds files this package did not write, is an export and
            `overwrite` is false, or cannot be created. Nothing is created or deleted.
    """
    directory = Path(directory).resolve()
    parent = _existing(directory.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot create {directory}: {parent} is not a writable folder; choose another target")
    _refuse_long(directory, parent)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file: choose a folder that does not exist yet")
    present = set(files_in(directory))
    if not present and not any(directory.iterdir()):
        return
    written = _manifest(directory)
    if written is None:
        raise ExportError(
            f"{directory} exists, is not empty and is not an export of {QUANTIZER_NAME}: choose another "
            "folder, or move it away (`overwrite` replaces exports only)"
        )
    if not overwrite:
        raise ExportError(
            f"{directory} holds an earlier export: pass overwrite=True (gptq-plugin convert: --overwrite) to "
            "replace it, or choose another"
        )
    foreign = sorted(present - written)
    if foreign:
        raise ExportError(
            f"{directory} holds files that {QUANTIZER_NAME} did not write ({', '.join(foreign[:4])}): move "
            "them away first, replacing the export would delete them"
        )


class Staging:
    """A new folder beside `directory`, under a hidden name; `place` renames it to `directory`.

    Args:
        directory: The target; its parents are created.
        overwrite: Replace an earlier export.

    Raises:
        ExportError: See `check_export_dir`.
    """

    def __init__(self, directory: str | Path, overwrite: bool = False) -> None:
        self.directory = Path(directory).resolve()
        self._overwrite = overwrite
        check_export_dir(self.directory, overwrite)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.directory)
        self.path = hidden_beside(self.directory, "partial")
        self.path.mkdir()
        self._lock = os.open(self.path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def place(self) -> None:
        """Flushes all files to the disk, then puts the folder in its target's place.

        Raises:
            ExportError: The target can no longer be used.
        """
        _flush(self.path)
        check_export_dir(self.directory, self._overwrite)  # again: it may have changed
        if not self.directory.exists():
            self.path.rename(self.directory)
        elif _exchange(self.path, self.directory):
            _remove_earlier(self.path)
        else:
            _step_aside(self.path, self.directory)
        self._unlock()
        _sync(self.directory.parent)

    def remove(self) -> None:
        """Removes the folder, unless it was placed."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def files_in(directory: Path) -> list[str]:
    """Lists all files below the folder, links included, by relative name."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path.relative_to(directory).as_posix() for path in paths]


def beside(directory: Path, suffix: str, prefix: str = "") -> Path:
    """The folder's path with a longer name. A name too long for that is cut, and keeps a digest of the whole one.

    Args:
        directory: The folder, existing or not.
        suffix, prefix: Put around its name.
    """
    start = _cut(directory, prefix, len(os.fsencode(suffix)))
    return directory.with_name(f"{start}{suffix}")


def hidden_beside(directory: Path, kind: str) -> Path:
    """A new hidden path beside the folder, of some `kind` ("partial")."""
    return beside(directory, f".{uuid.uuid4().hex[:8]}.{kind}", prefix=".")


def _cut(directory: Path, prefix: str, more: int) -> str:
    """The prefix and the folder's name, cut so that `more` bytes can follow."""
    room = _longest_name(_existing(directory.parent)) - more
    start = prefix + directory.name
    if len(os.fsencode(start)) <= room:
        return start
    digest = hashlib.sha256(os.fsencode(directory.name)).hexdigest()[:16]
    whole_characters = os.fsencode(start)[: room - len(digest) - 1].decode(errors="ignore")
    return f"{whole_characters}-{digest}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    with contextlib.suppress(OSError):  # a name on the way is longer than names may be
        if folder.exists():
            return folder
    return folder if folder.parent == folder else _existing(folder.parent)


def _longest_name(folder: Path) -> int:
    """Bytes that a name in an existing folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255


def _refuse_long(directory: Path, existing: Path) -> None:
    """Refuses a path that has a name longer than the file system takes, or is too long for the files in it."""
    longest = _longest_name(existing)
    for name in directory.relative_to(existing).parts:
        if len(os.fsencode(name)) > longest:
            raise ExportError(
                f"cannot create {directory}: {name[:40]}… has {len(os.fsencode(name))} bytes, and a name there may "
                f"have {longest}; choose a shorter one"
            )
    if len(os.fsencode(directory)) > _LONGEST_PATH:
        raise ExportError(f"cannot create {directory}: a path may have {_LONGEST_PATH} bytes; choose a shorter one")


def _manifest(directory: Path) -> set[str] | None:
    """The files an earlier export wrote into `directory`, or None if it is not an export of ours."""
    try:
        description = read_json(directory / QUANTIZE_CONFIG)
        return set(description["meta"][QUANTIZER_NAME]["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_leftovers(directory: Path) -> None:
    """Removes the hidden folders that killed exports to the same target left: those that no process has locked."""
    start = _cut(directory, ".", len(".12345678.partial"))
    for folder in directory.parent.glob(f"{glob.escape(start)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < _YOUNG:
                continue  # its lock may be about to be taken
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                log.warning("removed %s, left by an export that was killed", folder)
            finally:
                os.close(handle)


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
