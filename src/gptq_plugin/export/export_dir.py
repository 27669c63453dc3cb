"""The folder of an export: whether it can be written and may be replaced, and where the work on it is done.

Only an earlier export is ever replaced. It is recognized by the list of its files in quantize_config.json.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import uuid
from pathlib import Path

from gptq_plugin.checkpoint.files import QUANTIZE_CONFIG, read_json
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.errors import ExportError

_LONGEST_PATH = 4095 - 256  # bytes; the rest is for the hidden name and the files in it
_WORK = re.compile(r"\.[0-9a-f]{8}\.[a-z]+")  # names of the folders of exports that work inside their target
_OF_VOLUMES = ("lost+found",)  # new volumes have it


def check_export_dir(directory: str | Path, overwrite: bool = False) -> None:
    """Checks, before any training or quantization, that `export_model` could write to `directory`.

    Args:
        directory: The target folder.
        overwrite: An earlier export of this package may be replaced.

    Raises:
        ExportError: It is a file, is not ours, holds files this package did not write, is an export and
            `overwrite` is false, or cannot be created. Nothing is created or deleted.
    """
    directory = resolved(directory)
    try:
        _check(directory, overwrite)
    except OSError as error:
        raise ExportError(f"cannot write an export to {directory}: {error}; choose another target") from error


def resolved(directory: str | Path) -> Path:
    """The folder's absolute path, links followed.

    Raises:
        ExportError: There is none: its links lead in a circle, or no file can have that name.
    """
    try:
        path = Path(directory).resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # Python 3.13 leaves a circle of links as it is
        str(path).encode()
    except UnicodeEncodeError:
        raise ExportError(
            f"cannot write an export to {os.fspath(directory)!a}: its path {str(path)!a} is not UTF-8, which "
            "safetensors and JSON need; choose another target"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            return path
        raise ExportError(
            f"cannot write an export to {os.fspath(directory)!a}: {error}; choose another target"
        ) from error
    return path


def works_inside(directory: Path) -> bool:
    """True if an export to this folder works inside it, because the folder itself cannot be exchanged for another: it
    is a mount point, it or one below it is the working directory, or the folder around it cannot be written to."""
    if not directory.is_dir():
        return False
    return is_mount(directory) or _holds_working_directory(directory) or not _writable(directory.parent)


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


def files_in(directory: Path) -> list[str]:
    """Lists all files below the folder, links included, by relative name."""
    found = (path for entry in entries(directory) for path in (entry, *_below(entry)))
    return [path.relative_to(directory).as_posix() for path in found if path.is_symlink() or not path.is_dir()]


def beside(directory: Path, suffix: str, prefix: str = "") -> Path:
    """The folder's path with a longer name. A name too long for that is cut, and keeps a digest of the whole one.

    Args:
        directory: The folder, existing or not.
        suffix, prefix: Put around its name.
    """
    start = cut(directory, prefix, len(os.fsencode(suffix)))
    return directory.with_name(f"{start}{suffix}")


def hidden_beside(directory: Path, kind: str) -> Path:
    """A new hidden path of some `kind` ("partial") beside the folder, or in it where it `works_inside`."""
    mark = f".{uuid.uuid4().hex[:8]}.{kind}"
    return directory / mark if works_inside(directory) else beside(directory, mark, prefix=".")


def cut(directory: Path, prefix: str, more: int) -> str:
    """The prefix and the folder's name, cut so that `more` bytes can follow."""
    room = _longest_name(_existing(directory.parent)) - more
    start = prefix + directory.name
    if len(os.fsencode(start)) <= room:
        return start
    digest = hashlib.sha256(os.fsencode(directory.name)).hexdigest()[:16]
    whole_characters = os.fsencode(start)[: room - len(digest) - 1].decode(errors="ignore")
    return f"{whole_characters}-{digest}"


def _check(directory: Path, overwrite: bool) -> None:
    parent = _existing(directory.parent)
    _refuse_long(directory, parent)
    if works_inside(directory):
        parent = directory
    if not parent.is_dir() or not _writable(parent):
        raise ExportError(f"cannot create {directory}: {parent} is not a writable folder; choose another target")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file: choose a folder that does not exist yet")
    if not entries(directory):
        return
    written = _manifest(directory)
    if written is None:  # what else is there is not looked at: it may be a whole disk
        raise ExportError(
            f"{directory} exists, is not empty and is not an export of {QUANTIZER_NAME}: choose another "
            "folder, or move it away (`overwrite` replaces exports only)"
        )
    if not overwrite:
        raise ExportError(
            f"{directory} holds an earlier export: pass overwrite=True (gptq-plugin convert: --overwrite) to "
            "replace it, or choose another"
        )
    foreign = sorted(set(files_in(directory)) - written)
    if foreign:
        raise ExportError(
            f"{directory} holds files that {QUANTIZER_NAME} did not write ({', '.join(foreign[:4])}): move "
            "them away first, replacing the export would delete them"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    with contextlib.suppress(OSError):  # a name on the way is longer than names may be
        if folder.exists():
            return folder
    return folder if folder.parent == folder else _existing(folder.parent)


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _holds_working_directory(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path.cwd().resolve().is_relative_to(directory)
    return False


def _unescaped(path: bytes) -> bytes:
    """A path of mountinfo, where spaces are \\040."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), path)


def _below(entry: Path) -> list[Path]:
    return [] if entry.is_symlink() else list(entry.rglob("*"))


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
                f"cannot create {_short(directory)}: {name[:40]}… has {len(os.fsencode(name))} bytes, and a name "
                f"there may have {longest}; choose a shorter one"
            )
    if len(os.fsencode(directory)) > _LONGEST_PATH:
        raise ExportError(
            f"cannot create {_short(directory)}: a path may have {_LONGEST_PATH} bytes; choose a shorter one"
        )


def _short(directory: Path) -> str:
    path = str(directory)
    return path if len(path) <= 400 else f"{path[:200]}…{path[-100:]}"


def _manifest(directory: Path) -> set[str] | None:
    """The files an earlier export wrote into `directory`, or None if it is not an export of ours."""
    try:
        description = read_json(directory / QUANTIZE_CONFIG)
        return set(description["meta"][QUANTIZER_NAME]["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
