"""What code does to files and to the machine: a folder before and after, and what Python audits."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from campaigns.campaign import Wrong

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {  # events of sys.audit, with the places of their paths among the arguments
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.utime": (0,),
}
_RUNS = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "socket.connect", "subprocess.Popen")


_BEGINNING = 64 << 20  # bytes that are read of a file


def beginning(file: Path) -> bytes:
    """The first bytes of a file: all of it, but for those that are made large."""
    with file.open("rb") as opened:
        return opened.read(_BEGINNING)


def contents(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything in a folder, links not followed: kind and mode, and the bytes' hash or the link's target."""
    found: dict[str, tuple[Any, ...]] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            is_file = path.is_file() and not path.is_symlink()
            what = (
                os.readlink(path)
                if path.is_symlink()
                else (path.stat().st_size, hashlib.sha256(beginning(path)).digest())
                if is_file
                else ""
            )
            found[str(path.relative_to(folder))] = (mode, what)
    return found


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Raises `Wrong` if the folder is not afterwards what it was."""
    before = contents(folder)
    yield
    after = contents(folder)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise Wrong(f"changed in {folder.name}: {', '.join(changed[:5])}")


@contextmanager
def nothing_outside(*inside: Path, secret: Path | None = None) -> Iterator[None]:
    """Raises `Wrong` if Python code writes a file outside these folders, starts a process or a connection, or reads
    what lies in `secret`. For the length of a case in its own process: hooks of sys.audit stay."""
    allowed = [str(folder.resolve()) for folder in inside]
    seen: list[str] = []
    active = True

    def is_inside(path: Any, folders: list[str]) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))
        return real == os.devnull or any(real == one or real.startswith(f"{one}/") for one in folders)

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if not active:
            return
        if event == "open" and arguments[0] is not None:
            path, _, flags = arguments
            writes = bool(flags & _WRITES) if isinstance(flags, int) else False
            if writes and not is_inside(path, allowed):
                seen.append(f"opened {path} to write")
            elif secret is not None and not isinstance(path, int) and is_inside(path, [str(secret.resolve())]):
                seen.append(f"read {path}")
        elif event in _CHANGES:
            seen.extend(f"{event} {arguments[at]}" for at in _CHANGES[event] if not is_inside(arguments[at], allowed))
        elif event in _RUNS:
            seen.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(see)
    try:
        yield
    finally:
        active = False
        if seen:
            raise Wrong("; ".join(dict.fromkeys(seen)))
