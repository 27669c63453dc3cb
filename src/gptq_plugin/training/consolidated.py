"""Writes a sharded module's parameters to safetensors files and maps them from there: `consolidated`.

Ranks that map the same file share its memory. So a node holds the model once, however many ranks it runs, and of it
only the part that is being read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.errors import ExportError
from gptq_plugin.export.hidden_folders import UNSHARDED, HiddenFolder, hidden_beside
from gptq_plugin.export.shard_writer import ShardWriter
from gptq_plugin.memory.shared_layers import SharedLayers

log = logging.getLogger(__name__)

_SHARD = 2**28  # bytes; two of these, and a tensor, are in the writer's memory at a time


@dataclass
class Consolidated:
    """A folder with the whole tensors.

    Attributes:
        tensors: Name -> tensor on the CPU, mapped: read-only, and valid as long as the folder exists.
        folder: Visible to all ranks of a node.
        writes: True on the rank that writes there.
    """

    tensors: dict[str, Tensor]
    folder: Path
    writes: bool
    _quantizations: int = 0

    def layers(self) -> SharedLayers:
        """Makes room for the layers of one more quantization. Every rank calls it."""
        self._quantizations += 1
        return SharedLayers(self.folder / f"layers-{self._quantizations}", self.writes)


@contextlib.contextmanager
def consolidated(
    tensors: Iterable[tuple[str, Tensor]], beside: Path, *, node: int, local_rank: int
) -> Iterator[Consolidated]:
    """Writes the tensors to a temporary folder, maps them from there, and removes the folder after the block.

    One rank writes; if nodes share no folder, one rank of each node. In a process group every rank calls it.

    Args:
        tensors: Name -> tensor, each valid until the next is read. Reading them is collective.
        beside: Sibling of the temporary folder.
        node: Number of this rank's node.
        local_rank: Number of this rank in it.

    Raises:
        ExportError: This rank cannot write or read the folder.
        RankError: Another rank cannot.
    """
    with contextlib.ExitStack() as stack:
        with distributed.ending_together():
            folder, writes = _folder(beside, node, local_rank, stack)
            _write(tensors, folder if writes else None)
            _wait_for_all_ranks()
            mapped = _map(folder)
            _wait_for_all_ranks()  # a writer that leaves the block removes its folder
        # The block's last steps are collective, so no rank needs the files when a writer leaves it.
        yield Consolidated(mapped, folder, writes)


def _folder(beside: Path, node: int, local_rank: int, stack: contextlib.ExitStack) -> tuple[Path, bool]:
    """Returns the folder this rank reads, which the stack removes, and whether this rank writes it."""
    first = _make(beside, stack) if distributed.rank() == 0 else None
    home, path = distributed.object_from_first((node, first))
    seen = distributed.gather_objects((node, path.is_dir()))
    apart = {number for number, sees in seen if not sees and number != home}  # nodes without rank 0's file system
    if apart:
        log.info("nodes %s do not see %s: each writes the weights for itself", sorted(apart), path)
    own = _make(beside, stack) if node in apart and local_rank == 0 else None
    folders = {number: made for number, made in distributed.gather_objects((node, own)) if made is not None}
    return folders.get(node, path), first is not None or own is not None


def _make(beside: Path, stack: contextlib.ExitStack) -> Path:
    path = hidden_beside(beside.resolve(), UNSHARDED)
    with _advice():
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(HiddenFolder(path).remove)
    return path


def _write(tensors: Iterable[tuple[str, Tensor]], folder: Path | None) -> None:
    """Reads all tensors and writes them to the folder; None reads only.

    A failure is raised after the last tensor: until then the other ranks wait for this one's part of each.
    """
    writer = None if folder is None else ShardWriter(folder, _SHARD, durable=False)
    failure: Exception | None = None
    try:
        for name, tensor in tensors:
            if writer is None or failure is not None:
                continue
            try:
                writer.add({name: tensor if tensor.is_cuda else tensor.clone()})  # it copies from a GPU by itself
            except Exception as error:  # noqa: BLE001 (raised below)
                failure = error
        with _advice():
            if failure is not None:
                raise failure
            if writer is not None:
                writer.finish()
    finally:
        if writer is not None:
            writer.abort()


def _map(folder: Path) -> dict[str, Tensor]:
    """Memory-maps every tensor in the folder."""
    mapped: dict[str, Tensor] = {}
    with _advice():
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there")
        for file in folder.glob("*.safetensors"):
            with safe_open(str(file), framework="pt", device="cpu") as handle:
                mapped.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118 (no mapping)
    return mapped


def _wait_for_all_ranks() -> None:
    distributed.gather_objects(None)


@contextlib.contextmanager
def _advice() -> Iterator[None]:
    """Turns what the file system refuses into an ExportError that names this rank and what to change."""
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"the sharded weights cannot be put together in a temporary folder beside the export (rank "
            f"{distributed.rank()}: {error}). Choose an export_dir on a disk with room for the float model, which "
            "every rank of a node sees"
        ) from error
