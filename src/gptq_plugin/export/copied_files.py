"""Copies what a checkpoint's folder holds beside its weights: tokenizer, code, cards. Nothing from elsewhere."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptq_plugin.checkpoint.files import is_printable
from gptq_plugin.errors import CheckpointError
from gptq_plugin.options.limited_files import written_parts

_BLOCK = 1 << 24  # bytes
_DEEPEST = 50  # folders in each other


def files_to_copy(folder: Path, ignored: Sequence[str]) -> list[Path]:
    """The files in a folder and in those below it, by their paths relative to it.

    Links may lead to other files of the folder, or, in huggingface_hub's cache, to the blobs of its repository. A copy
    is published, and a link that leads elsewhere would publish what it leads to.

    Args:
        folder: The checkpoint.
        ignored: Names of files and folders that are not copied, as `fnmatch` takes them. Weights and descriptions must
            not be links to elsewhere either: they are written anew from what they hold.

    Raises:
        CheckpointError: A link leads elsewhere, or to a folder; something is neither file nor folder, or has a name
            that is no text.
    """
    roots = _roots(folder)
    return [path.relative_to(folder) for path in _walk(folder, ignored) if _checked(path, roots)]


def copy_files(folder: Path, files: Sequence[Path], target: Path) -> None:
    """Copies files, by their paths relative to a folder, into another. Links become files; holes stay holes."""
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        _copy(folder / file, target / file)


def occupied_bytes(folder: Path, files: Sequence[Path]) -> int:
    """Bytes that copies of the files take on a disk: of sparse files, less than their sizes."""
    found = [(folder / file).stat() for file in files]
    return sum(min(one.st_size, getattr(one, "st_blocks", one.st_size) * 512) for one in found)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        for start, end in written_parts(read.fileno()):
            read.seek(start)
            written.seek(start)
            while start < end:
                block = read.read(min(_BLOCK, end - start))
                if not block:  # it has become shorter
                    break
                start += written.write(block)
        written.truncate(os.fstat(read.fileno()).st_size)


def check_read(folder: Path, files: Sequence[Path]) -> None:
    """Checks files that are read, not copied, as `files_to_copy` does."""
    roots = _roots(folder)
    for file in files:
        _checked(file, roots)


def _walk(folder: Path, ignored: Sequence[str], deeper: int = _DEEPEST) -> Iterator[Path]:
    if not deeper:
        raise CheckpointError(f"{folder} is {_DEEPEST} folders below the checkpoint's, and is not copied: remove it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored):
            continue
        if not is_printable(entry.name):
            raise CheckpointError(f"{folder} has {entry.name!a}, a name that is no text (UTF-8): rename it")
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), ignored, deeper - 1)
        else:
            yield Path(entry.path)


def _roots(folder: Path) -> list[Path]:
    """The folders that links may lead into."""
    folder = folder.absolute()
    snapshots = [above.parent for above in (folder, *folder.parents) if above.parent.name == "snapshots"]
    return [folder.resolve(), *(found.parent.resolve() / "blobs" for found in snapshots)]


def _checked(path: Path, roots: Sequence[Path]) -> bool:
    """True for a file that may be copied.

    Raises:
        CheckpointError: It may not.
    """
    try:
        mode, home = path.stat().st_mode, path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise CheckpointError(f"{path} cannot be read: {error}. Remove it, or fetch the checkpoint again") from error
    if path.is_symlink() and not any(home.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path} is a link to {home}, outside of the checkpoint, and a copy would publish that: put the file "
            "itself there, or remove the link"
        )
    if not stat.S_ISREG(mode):
        kind = "a link to a folder" if stat.S_ISDIR(mode) else "neither a file nor a folder"
        raise CheckpointError(f"{path} is {kind}, which is not copied: remove it, or put files there")
    return True
