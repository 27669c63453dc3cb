"""Room on the disk: known before the work, and told where it runs out."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from gptq_plugin.errors import ExportError, brief

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # what file systems of networks answer
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
_OF_RUST = re.compile(r"os error (\d+)")


def flush(handle: int) -> None:
    """Flushes an open file to the disk, where the file system knows that.

    Raises:
        OSError: The disk did not take it.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def free_bytes(folder: Path) -> int | None:
    """Bytes that are free for a folder, existing or not; None if the file system does not tell."""
    for existing in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(existing)
            return usage.free if usage.total else None
    return None


def refuse_full(folder: Path, needed: int, what: str = "the export") -> None:
    """Refuses what there is no room for.

    Raises:
        ExportError: Fewer than `needed` bytes are free; an earlier export there takes its room until it is replaced.
    """
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise ExportError(
            f"{what} to {folder} needs about {needed} bytes, and {free} are free there: make room, or choose "
            "another folder"
        )


@contextlib.contextmanager
def disk_errors_explained(folder: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Turns an error of the system, such as that of a full disk, into one that names the folder. safetensors and
    tokenizers have errors of their own for them.

    Args:
        folder: Where the block writes.
        needed: Called for the bytes it has to write.

    Raises:
        ExportError: In place of these errors; with the bytes needed and those free, unless it is known that room does
            not lack.
    """
    try:
        yield
    except Exception as error:
        number = _OF_RUST.search(str(error))
        if not isinstance(error, OSError | SafetensorError) and not (type(error) is Exception and number):
            raise
        free = free_bytes(folder)
        room = f"It needs {needed()} bytes, and {'an unknown number' if free is None else free} are free there"
        code = int(number[1]) if number else getattr(error, "errno", None)
        remedy = f"{room}: make room" if code in _FULL else "See to it"
        raise ExportError(
            f"{folder} could not be written: {brief(error)}. {remedy}, or choose another folder, and export again"
        ) from error
