"""The folder of an export: whether it can be written and may be replaced.

Only an earlier export is ever replaced. It is recognized by the list of its files in quantize_config.json.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from gptq_plugin.checkpoint.files import QUANTIZE_CONFIG, read_json
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.errors import ExportError, brief
from gptq_plugin.export.hidden_folders import entries, existing, longest_name, try_out, works_inside, writable
from gptq_plugin.export.reclaim import reclaim
from gptq_plugin.options import fields

_LONGEST_PATH = 4095 - 256  # bytes; the rest is for the hidden name and the files in it


def check_export_dir(directory: str | Path, overwrite: bool = False) -> None:
    """Checks, before any training or quantization, that `export_model` could write to `directory`.

    Behind exports to it that were killed it clears up first (`reclaim`).

    Args:
        directory: The folder to be written.
        overwrite: An earlier export of this package may be replaced.

    Raises:
        ExportError: It is a file, is not ours, holds files this package did not write, is an export and
            `overwrite` is false, or cannot be created. Nothing stays that was not there, and nothing of others is
            deleted.
    """
    directory = resolved(directory)
    try:
        _check(directory, overwrite)
    except OSError as error:
        raise ExportError(f"cannot write an export to {directory}: {brief(error)}; choose another folder") from error


def resolved(directory: str | Path) -> Path:
    """The folder's absolute path, links followed.

    Raises:
        ExportError: There is none: its links lead in a circle, or no file can have that name.
        ValueError: It is no path.
    """
    fields.PATH.check("the export's folder", directory)
    try:
        path = Path(directory).resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # Python 3.13 leaves a circle of links as it is
        str(path).encode()
    except UnicodeEncodeError:
        raise ExportError(
            f"cannot write an export to {os.fspath(directory)!a}: its path {str(path)!a} is not UTF-8, which "
            "safetensors and JSON need; choose another folder"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            return path
        raise ExportError(
            f"cannot write an export to {os.fspath(directory)!a}: {brief(error)}; choose another folder"
        ) from error
    return path


def files_in(directory: Path) -> list[str]:
    """Lists all files below the folder, links included, by relative name."""
    found = (path for entry in entries(directory) for path in (entry, *_below(entry)))
    return [path.relative_to(directory).as_posix() for path in found if path.is_symlink() or not path.is_dir()]


def manifest(directory: Path) -> set[str] | None:
    """The files an export wrote into `directory`, or None if it is not an export of ours."""
    try:
        description = read_json(directory / QUANTIZE_CONFIG)
        return set(description["meta"][QUANTIZER_NAME]["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(directory: Path, overwrite: bool) -> None:
    parent = existing(directory.parent)
    _refuse_long(directory, parent)
    reclaim(directory)
    if works_inside(directory):
        parent = directory
    if not parent.is_dir() or not writable(parent):
        raise ExportError(f"cannot create {directory}: {parent} is not a writable folder; choose another folder")
    try_out(parent)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file: choose a folder that does not exist yet")
    if not entries(directory):
        return
    written = manifest(directory)
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


def _below(entry: Path) -> list[Path]:
    return [] if entry.is_symlink() else list(entry.rglob("*"))


def _refuse_long(directory: Path, folder: Path) -> None:
    """Refuses a path that has a name longer than the file system takes, or is too long for the files in it."""
    longest = longest_name(folder)
    for name in directory.relative_to(folder).parts:
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
