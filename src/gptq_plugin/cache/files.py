"""A folder of tensors, each file named by the hash of what it follows from: `KeptFiles`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_plugin.device.raw_bytes import raw_bytes
from gptq_plugin.errors import brief

_OURS = re.compile(r"[a-z]+-[0-9a-f]{64}\.safetensors|\.writing-\w+")  # nothing else in the folder is touched
_WRITING = ".writing-"  # begins the name of a file that is not complete
_ABANDONED = 3600.0  # seconds without a write, after which such a file is of a process that was killed
_LOOK_EVERY = 32  # writes, after which the files of other processes are counted again
_CHECKSUM, _FACTS = "checksum", "facts"


@dataclass(frozen=True)
class Kept:
    """The content of a file.

    Attributes:
        facts: Plain values.
        tensors: On the CPU, by name.
        checksum: SHA-256 of both, and of the file's name.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    checksum: str


@dataclass
class KeptFiles:
    """Keeps tensors in a folder of a limited size, from which the files unused for longest are removed first.

    Files appear complete or not at all, so that several processes may share a folder, and are compared with their
    checksum when they are read. No operation raises: what cannot be written is not kept, and what cannot be read is not
    there.

    Args:
        folder: Made when something is written.
        limit: Bytes of all files together.
        leaves_out: Kinds of content that are not written.

    Attributes:
        problems: Sentences on what could not be read or written.
        written: Bytes written so far.
    """

    folder: Path
    limit: int
    leaves_out: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    written: int = 0
    _bytes: int = 0  # of all files, as far as this process knows
    _writes: int = 0
    _is_writable: bool = True

    def read(self, kind: str, key: str) -> Kept | None:
        """What was kept under a key; None if nothing was, or not as it was written.

        The tensors are mapped from the file, which may be removed meanwhile.
        """
        path = self._path(kind, key)
        try:
            with safe_open(path, "pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            checksum = _checksum(path.stem + metadata.get(_FACTS, ""), tensors)
            if checksum != metadata.get(_CHECKSUM):
                raise ValueError("its bytes are not those that were written")
            facts = json.loads(metadata[_FACTS])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            what = "could not be read" if isinstance(error, OSError) else "is damaged"
            self.problems.append(f"{path} {what} and was computed again: {brief(error)}")
            return None
        with contextlib.suppress(OSError):  # of a folder that is read only
            os.utime(path)
        return Kept(facts, tensors, checksum)

    def write(self, kind: str, key: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keeps plain values and tensors under a key. After a failure nothing more is written."""
        if not self._is_writable or kind in self.leaves_out:
            return
        plain = _apart(tensors)
        text, path = json.dumps(facts), self._path(kind, key)
        metadata = {_FACTS: text, _CHECKSUM: _checksum(path.stem + text, plain)}
        writing = self.folder / f"{_WRITING}{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writing.touch()
            permissions = writing.stat().st_mode  # safetensors lets nobody else read
            save_file(plain, writing, metadata)
            writing.chmod(permissions)
            size = os.path.getsize(writing)
            self._make_room(size)
            os.replace(writing, path)
            self.written += size
        except (OSError, SafetensorError) as error:
            self._is_writable = False
            self.problems.append(f"nothing more is kept in {self.folder}: {brief(error)}")
        finally:
            with contextlib.suppress(OSError):
                writing.unlink(missing_ok=True)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key}.safetensors"

    def _make_room(self, size: int) -> None:
        """Removes files unused for longest until `size` more bytes fit; the one being written counts already."""
        self._writes += 1
        if self._writes % _LOOK_EVERY == 1 or self._bytes + size > self.limit:
            files = sorted(self._files())
            self._bytes = sum(bytes_ for _, bytes_, _ in files)
            for used, bytes_, path in files:
                abandoned = path.name.startswith(_WRITING) and used < time.time() - _ABANDONED
                if abandoned or (self._bytes > self.limit and not path.name.startswith(_WRITING)):
                    path.unlink(missing_ok=True)
                    self._bytes -= bytes_
        else:
            self._bytes += size
        if self._bytes > self.limit:
            raise OSError(f"a file of {size} bytes does not fit into {self.limit} with those that are being written")

    def _files(self) -> list[tuple[float, int, Path]]:
        """Of each file when it was used last, its bytes, and its path."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed by another process
                    if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with its own memory, as safetensors asks."""
    plain: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        plain[name] = own.clone() if own.untyped_storage().data_ptr() in used else own
        used.add(own.untyped_storage().data_ptr())
    return plain


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    hashed = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        hashed.update(raw_bytes(tensor).numpy().data)
    return hashed.hexdigest()
