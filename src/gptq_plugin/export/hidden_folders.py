"""Hidden folders of unfinished work: their place beside a target or in it, their names, and the lock that tells the
work of a living process from what a killed one left.

A target that cannot be exchanged for another folder has them inside (`works_inside`).
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

PARTIAL, LEAVING, REPLACED, UNSHARDED = "partial", "leaving", "replaced", "unsharded"  # kinds: see `reclaim`
_WORK = re.compile(r"\.[0-9a-f]{8}\.[a-z]+")  # names of hidden folders inside their target
_OF_VOLUMES = ("lost+found",)  # new volumes have it
_ROOM = len(".12345678.unsharded")  # bytes of the longest end of a name: all folders of a target begin alike


class HiddenFolder:
    """Makes a hidden folder that is locked until it is removed or released, or the process ends.

    Attributes:
        path: Where the folder is.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, -1
        while self._lock < 0:  # one that was taken for a leftover, and removed, before it was locked is made anew
            path.mkdir()
            try:
                self._lock_it()
            except BaseException:
                self.remove()
                raise

    def _lock_it(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._lock = os.open(self.path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            if not _is_open_at(self._lock, self.path):
                self.release()

    def move(self, path: Path) -> None:
        """Gives the folder another path; it stays locked."""
        self.path.rename(path)
        self.path = path

    def remove(self) -> None:
        """Removes the folder, if it is there."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Leaves the folder to others."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Yields True with a hidden folder locked, or False if a process works in it, or it is gone."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = _is_open_at(lock, folder)
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(lock)


def hidden_folders(directory: Path, kind: str) -> list[Path]:
    """All hidden folders of a target and kind, of living processes and of others."""
    start = glob.escape(cut(directory, ".", _ROOM))
    beside_it = directory.parent.glob(f"{start}.{'[0-9a-f]' * 8}.{kind}")
    inside = (path for path in directory.glob(f".*.{kind}") if _WORK.fullmatch(path.name))
    return [path for path in (*beside_it, *inside) if path.is_dir() and not path.is_symlink()]


def works_inside(directory: Path) -> bool:
    """True if an export to this folder works inside it, because the folder itself cannot be exchanged for another: it
    is a mount point, it or one below it is the working directory, or the folder around it cannot be written to."""
    if not directory.is_dir():
        return False
    return is_mount(directory) or _holds_working_directory(directory) or not writable(directory.parent)


def is_mount(directory: Path) -> bool:
    """True if something is mounted there, a folder of the same file system included (which `os.path.ismount` does not
    see)."""
    if os.path.ismount(directory):
        return True
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
        return os.fsencode(directory) in (_unescaped(line.split(b" ")[4]) for line in mounts)
    return False


def entries(directory: Path) -> list[Path]:
    """What lies in an existing folder, less what exports that work inside it and new volumes put there."""
    return [path for path in directory.iterdir() if path.name not in _OF_VOLUMES and not _WORK.fullmatch(path.name)]


def beside(directory: Path, suffix: str) -> Path:
    """The folder's path with a longer name. A name too long for that is cut, and keeps a digest of the whole one.

    Args:
        directory: The folder, existing or not.
        suffix: Put behind its name.
    """
    start = cut(directory, "", len(os.fsencode(suffix)))
    return directory.with_name(f"{start}{suffix}")


def hidden_beside(directory: Path, kind: str) -> Path:
    """A new hidden path of some `kind` ("partial") beside the folder, or in it where it `works_inside`."""
    mark = hidden_name(kind)
    return directory / mark if works_inside(directory) else directory.with_name(cut(directory, ".", _ROOM) + mark)


def hidden_name(kind: str) -> str:
    """A new name of a hidden folder inside its target."""
    return f".{uuid.uuid4().hex[:8]}.{kind}"


def lasting_beside(directory: Path, kind: str) -> Path:
    """The hidden path of some `kind` ("resume") of a folder that every run finds again: where an earlier one has made
    it, else beside the folder, or in it where it `works_inside`."""
    mark = f".{hashlib.sha256(os.fsencode(directory.name)).hexdigest()[:8]}.{kind}"
    beside_it, inside = directory.with_name(cut(directory, ".", _ROOM) + mark), directory / mark
    there = [path for path in (beside_it, inside) if path.is_dir()]
    return there[0] if there else inside if works_inside(directory) else beside_it


def cut(directory: Path, prefix: str, more: int) -> str:
    """The prefix and the folder's name, cut so that `more` bytes can follow."""
    room = longest_name(existing(directory.parent)) - more
    start = prefix + directory.name
    if len(os.fsencode(start)) <= room:
        return start
    digest = hashlib.sha256(os.fsencode(directory.name)).hexdigest()[:16]
    whole_characters = os.fsencode(start)[: room - len(digest) - 1].decode(errors="ignore")
    return f"{whole_characters}-{digest}"


def _is_open_at(handle: int, path: Path) -> bool:
    """True if the open folder is the one at this path, and not one that was there before."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _holds_working_directory(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path.cwd().resolve().is_relative_to(directory)
    return False


def _unescaped(path: bytes) -> bytes:
    """A path of mountinfo, where spaces are \\040."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), path)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    with contextlib.suppress(OSError):  # a name on the way is longer than names may be
        if folder.exists():
            return folder
    return folder if folder.parent == folder else existing(folder.parent)


def writable(folder: Path) -> bool:
    """True if files can be made there."""
    return os.access(folder, os.W_OK | os.X_OK)


def try_out(folder: Path) -> None:
    """Makes a hidden folder in an existing one, renames it and removes it, as an export does. Permissions do not tell
    all: a disk may have no room for names, and a file system no renames.

    Raises:
        OSError: One of these failed.
    """
    first, second = (folder / hidden_name(PARTIAL) for _ in range(2))
    try:
        first.mkdir()
        os.rename(first, second)
        second.rmdir()
    finally:
        for left in (first, second):
            shutil.rmtree(left, ignore_errors=True)


def longest_name(folder: Path) -> int:
    """Bytes that a name in an existing folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255
