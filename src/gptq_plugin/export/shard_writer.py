"""Writes tensors to safetensors files in the background: `ShardWriter`.

One thread gathers tensors and writes a file, a shard, whenever it has enough; another waits for the disk. A written
tensor can be read back at once, mapped from the file, so that the caller can free its own copy.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gptq_plugin.checkpoint.files import INDEX, WEIGHTS
from gptq_plugin.checkpoint.tensor_file import write_tensors
from gptq_plugin.device.memory import trim
from gptq_plugin.errors import ExportError, brief
from gptq_plugin.export.disk_space import disk_errors_explained, flush

Tensors = dict[str, Tensor]
Prepare = Callable[[Tensors], Tensors]


class ShardWriter:
    """Writes tensors to safetensors files of one folder, on its own threads.

    At most two shards and the tensors of one `add` are held on the host, half a shard of those that may wait in files:
    beyond that, `add` waits. An error on a thread is raised by the next `add`, or by `finish`. Call it from one thread
    at a time.

    Args:
        directory: An existing folder. Files named shard-*.safetensors there belong to this writer.
        shard_bytes: A shard is written as soon as it has this many bytes.
        durable: See that each shard is on the disk; False leaves that to the system, for files that go anyway.
        piece_bytes: Tensors that come from a CPU wait for their shard in files of at least so many bytes, from which
            they are mapped, so that they take no memory; None keeps them in memory.
    """

    def __init__(
        self, directory: Path, shard_bytes: int, *, durable: bool = True, piece_bytes: int | None = None
    ) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._durable = durable
        self._worker = ThreadPoolExecutor(1, "shards")
        self._flusher = ThreadPoolExecutor(1, "flushed-shards")
        self._changed = threading.Condition()
        self._held = 0  # bytes that were added and are in no file yet
        self._waiting = 0  # of them, those that may wait in a file
        self._failure: BaseException | None = None
        self._gathered: Tensors = {}  # the next shard
        self._gathered_bytes = 0
        self._in_memory = 0  # of them, those that are in no file yet
        self._piece_bytes = piece_bytes and min(piece_bytes, shard_bytes // 2)  # `add` waits for files of more
        self._loose: Tensors = {}  # the part of the next shard that is in memory and may wait in a file
        self._loose_bytes = 0
        self._pieces: dict[str, Any] = {}  # name -> safetensors' handle of the file in which it waits
        self._files: list[Path] = []
        self._written: dict[str, Any] = {}  # name -> safetensors' handle of the shard that holds it

    def add(self, tensors: Tensors, prepare: Prepare | None = None) -> None:
        """Takes tensors, without waiting for their device.

        Args:
            tensors: By name. Their values must not change until they are in a file, and none may share memory. From a
                GPU they are copied, in the order of its current stream; on a CPU they are kept, not copied.
            prepare: Turns `tensors`, on the host, into those to write; called on the writer's thread.

        Raises:
            ExportError: An earlier shard could not be written.
        """
        size = _size(tensors)
        may_wait = self._piece_bytes is not None and not any(tensor.is_cuda for tensor in tensors.values())

        def has_room() -> bool:
            return self._held < 2 * self._shard_bytes and not (may_wait and 2 * self._waiting >= self._shard_bytes)

        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or has_room())
            self._raise_failure()
            self._held += size
            self._waiting += size * may_wait
        host, copied = _to_host(tensors)
        self._worker.submit(self._take, host, size, copied, prepare)

    def read(self, name: str) -> Tensor | None:
        """A tensor mapped from its shard, or from the file in which it waits for that; None while it is in none. Valid
        even if the file is renamed or removed; a file of waiting tensors takes its room until none is in use."""
        handle = self._written.get(name) or self._pieces.get(name)
        return None if handle is None else handle.get_tensor(name)

    def is_in_shard(self, name: str) -> bool:
        """Returns whether a tensor's shard is written."""
        return name in self._written

    def finish(self, also: Sequence[Path] = (), **metadata: int) -> dict[str, list[str]]:
        """Writes the rest and renames the files: model.safetensors if all fits in one shard, else
        model-0000i-of-0000N.safetensors with an index.

        Args:
            also: Safetensors files that others wrote into the folder; they become shards like our own.
            metadata: For the index, beside ``total_size``.

        Returns:
            File name -> the tensors in it.

        Raises:
            ExportError: A shard could not be written.
        """
        self._worker.shutdown()
        self._raise_failure()
        if self._gathered:
            also = self._merge(also)
            self._write()
        self._flusher.shutdown()
        self._raise_failure()
        files = [*self._files, *also]
        tensors, total = [_mapped(file) for file in files], len(files)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)] if total > 1 else [WEIGHTS]
        for file, name in zip(files, names, strict=True):
            file.rename(self._directory / name)
        contents = {name: list(held) for name, held in zip(names, tensors, strict=True)}
        if total > 1:
            index = {
                "metadata": {**metadata, "total_size": sum(map(_size, tensors))},
                "weight_map": {tensor: name for name, held in contents.items() for tensor in held},
            }
            content = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._directory / INDEX).write_text(content, encoding="utf-8")
        return contents

    def abort(self) -> None:
        """Ends the threads after the file they are writing, and drops the rest. May be called at any time."""
        self._fail(ExportError("the export was given up"))
        self._worker.shutdown()
        self._flusher.shutdown()

    def _take(
        self, tensors: Tensors, size: int, copied: list[torch.cuda.Event], prepare: Prepare | None
    ) -> None:  # on the thread
        if self._failure is not None:
            return
        try:
            for event in copied:
                event.synchronize()
            if copied:  # pinned memory is slow to allocate: return it to the pool at once, for the next `add`
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            prepared = tensors if prepare is None else prepare(tensors)
            self._gathered.update(prepared)
            self._gathered_bytes += size
            self._in_memory += size
            if self._piece_bytes is not None and not copied:
                self._loose.update(prepared)
                self._loose_bytes += size
            if self._gathered_bytes >= self._shard_bytes:
                self._write()
            elif self._piece_bytes is not None and self._loose_bytes >= self._piece_bytes:
                self._map_loose()
        except BaseException as error:  # noqa: BLE001 (it is raised on the caller's thread)
            self._fail(error)

    def _write(self) -> None:
        file = self._directory / f"shard-{len(self._files) + 1:05d}.safetensors"
        with disk_errors_explained(file, lambda: _size(self._gathered)):
            write_tensors(self._gathered, file, {"format": "pt"})
            handle = safe_open(str(file), framework="pt", device="cpu")
        self._files.append(file)
        self._written.update(dict.fromkeys(self._gathered, handle))
        self._gathered, self._gathered_bytes, self._pieces = {}, 0, {}
        self._let_go(self._in_memory)
        if self._durable:
            self._flusher.submit(self._flush, file)

    def _let_go(self, size: int) -> None:
        """Notes that so many bytes, all loose ones among them, are in files now."""
        with self._changed:
            self._held -= size
            self._waiting -= self._loose_bytes
            self._changed.notify_all()
        self._in_memory -= size
        self._loose, self._loose_bytes = {}, 0
        trim()

    def _flush(self, file: Path) -> None:  # on the other thread
        try:
            size = file.stat().st_size
            with disk_errors_explained(file, lambda: size), file.open("rb") as written:
                flush(written.fileno())
        except BaseException as error:  # noqa: BLE001 (it is raised on the caller's thread)
            self._fail(error)

    def _map_loose(self) -> None:
        """Has the tensors that are in memory wait in a file, which lasts as long as it is mapped."""
        file = self._directory / "waiting.safetensors"
        with disk_errors_explained(file, lambda: _size(self._loose)):
            write_tensors(self._loose, file)
            handle = safe_open(str(file), framework="pt", device="cpu")
            file.unlink()
        self._pieces.update(dict.fromkeys(self._loose, handle))
        self._gathered.update({name: handle.get_tensor(name) for name in self._loose})
        self._let_go(self._loose_bytes)

    def _merge(self, also: Sequence[Path]) -> Sequence[Path]:
        """Moves the tensors of one small file into our only shard; returns the files that remain."""
        if self._files or len(also) != 1:
            return also
        tensors = _mapped(also[0])
        if self._gathered_bytes + _size(tensors) >= self._shard_bytes:
            return also
        self._gathered.update(tensors)
        also[0].unlink()  # the mapping stays valid
        return ()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._gathered, self._loose, self._pieces = {}, {}, {}
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _to_host(tensors: Tensors) -> tuple[Tensors, list[torch.cuda.Event]]:
    """Copies tensors to the host; returns them with the events after which those from a GPU have arrived."""
    host: Tensors = {}
    streams = set()
    for name, tensor in tensors.items():
        if tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            host[name] = pinned.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # its memory must not be reused before it is copied
            streams.add(stream)
        else:
            host[name] = tensor.cpu().contiguous()
    events = []
    for stream in streams:
        events.append(torch.cuda.Event(blocking=True))
        events[-1].record(stream)
    return host, events


def _mapped(file: Path) -> Tensors:
    """Maps every tensor in the file; nothing is read before it is used.

    Raises:
        ExportError: Too many files are open, or memory has no room.
    """
    try:
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (the handle is no mapping)
    except RuntimeError as error:  # PyTorch's, for errors of the system
        raise ExportError(f"{file} cannot be mapped: {brief(error)}. See to that, and export again") from error


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
