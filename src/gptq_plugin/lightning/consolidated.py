"""A sharded module's parameters in safetensors files, and mapped from them: `consolidated`.

Ranks that map the same file share its memory, so a node holds the model once, however many ranks it runs, and only the
part of it that is being read.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.errors import ExportError
from gptq_plugin.export.shard_writer import ShardWriter
from gptq_plugin.memory.shared_layers import SharedLayers

log = logging.getLogger(__name__)

_SHARD = 2**28  # bytes; two of these, and a tensor, are in the writer's memory at a time


@dataclass
class Consolidated:
    """What lies in the folder.

    Attributes:
        tensors: Name -> tensor on the CPU, mapped: not to be written to, and not to be used when the folder is gone.
        folder: All ranks of a node see it.
        writes: Whether it is this rank that writes there.
    """

    tensors: dict[str, Tensor]
    folder: Path
    writes: bool
    _quantizations: int = 0

    def layers(self) -> SharedLayers:
        """Room for the layers of one more quantization. Every rank calls it."""
        self._quantizations += 1
        return SharedLayers(self.folder / f"layers-{self._quantizations}", self.writes)


@contextlib.contextmanager
def consolidated(
    tensors: Iterable[tuple[str, Tensor]], beside: Path, *, node: int, local_rank: int
) -> Iterator[Consolidated]:
    """Writes the tensors to a temporary folder, which is gone afterwards, and maps them from there.

    One rank writes; where nodes have no folder in common, one of each node. In a process group every rank calls it.

    Args:
        tensors: Name -> tensor, each good until the next is asked for. To read them is collective.
        beside: The temporary folder lies beside this one.
        node: Number of this rank's node.
        local_rank: Number of this rank in it.

    Raises:
        ExportError: A rank that should write cannot, or one that should read. On every rank.
    """
    with contextlib.ExitStack() as stack:
        folder, writes = _folder(beside, node, local_rank, stack)
        _raise_together(_write(tensors, folder if writes else None))
        mapped, failure = _map(folder)
        _raise_together(failure)
        # Its last steps are collective: when a writer leaves the block, nobody needs the files any more.
        yield Consolidated(mapped, folder, writes)


def _folder(beside: Path, node: int, local_rank: int, stack: contextlib.ExitStack) -> tuple[Path, bool]:
    """The folder this rank reads from, which the stack removes, and whether it is this rank that writes it."""
    first = _make(beside, stack, distributed.rank() == 0)
    home, path = distributed.object_from_first((node, first))
    seen = distributed.gather_objects((node, path.is_dir()))
    apart = {number for number, sees in seen if not sees and number != home}  # nodes without rank 0's file system
    if apart:
        log.info("nodes %s do not see %s: each writes the weights for itself", sorted(apart), path)
    own = _make(beside, stack, node in apart and local_rank == 0)
    folders = {number: made for number, made in distributed.gather_objects((node, own)) if made is not None}
    return folders.get(node, path), first is not None or own is not None


def _make(beside: Path, stack: contextlib.ExitStack, is_asked: bool) -> Path | None:
    """A new folder on the ranks that are asked for one. Every rank calls it."""
    folder = beside.resolve().parent / f".{beside.name}.{uuid.uuid4().hex[:8]}.unsharded"

    def make() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)

    _raise_together(_failure(make) if is_asked else None)
    return folder if is_asked else None


def _write(tensors: Iterable[tuple[str, Tensor]], folder: Path | None) -> str | None:
    """Reads all tensors, whatever happens here, since the other ranks wait for this one's part of each.

    Args:
        folder: Where to write them; None reads only.

    Returns:
        Why they are not written.
    """
    writer = None if folder is None else ShardWriter(folder, _SHARD)
    failure: str | None = None
    try:
        for name, tensor in tensors:
            if writer is not None and failure is None:
                kept = tensor if tensor.is_cuda else tensor.clone()  # from a GPU the writer makes a copy of its own
                failure = _failure(partial(writer.add, {name: kept}))
        if writer is not None and failure is None:
            failure = _failure(writer.finish)
    finally:
        if writer is not None:
            writer.abort()
    return failure


def _map(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """Everything in the folder, of which nothing is read before it is used, or why it cannot be had."""
    mapped: dict[str, Tensor] = {}

    def read() -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there")
        for file in folder.glob("*.safetensors"):
            with safe_open(str(file), framework="pt", device="cpu") as handle:
                mapped.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118 (no mapping)

    return mapped, _failure(read)


def _failure(step: Callable[[], object]) -> str | None:
    try:
        step()
    except Exception as error:  # noqa: BLE001 (raised by `_raise_together`, on every rank)
        return str(error)
    return None


def _raise_together(failure: str | None) -> None:
    """Raises on every rank what failed on one of them."""
    failures = {rank: said for rank, said in enumerate(distributed.gather_objects(failure)) if said is not None}
    if failures:
        said = "; ".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
        raise ExportError(
            f"the sharded weights cannot be put together in a temporary folder beside the export ({said}). Choose an "
            "export_dir on a disk with room for the float model, which every rank of a node sees"
        )
