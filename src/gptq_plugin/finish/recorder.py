"""Losses and gradients of batches, by a CUDA graph where batches have the same shapes: `Recorder`.

A step of a small model waits for the host, which queues hundreds of kernels. A graph of them is queued at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections import UserDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import map_tensors
from gptq_plugin.device.memory import free_bytes, peak_bytes
from gptq_plugin.device.modules import modules_of

log = logging.getLogger(__name__)

Gradients = Sequence[Tensor | None]

_MOST = 8  # graphs of one recorder: of batches with more kinds of shapes the others are computed as they come
_ROOM = 3  # times what a batch takes has to be free: its graph may take more, and other batches are computed beside it
_TOLERANCE = 1e-2  # of a graph's gradients, as a share of their norm


class NotRecordableError(Exception):
    """A batch, or what computes its gradients, cannot be recorded."""


@dataclass(frozen=True)
class _Recording:
    """A graph, the tensors that it reads, and those that it writes.

    Attributes:
        graph: As PyTorch has it.
        read: In place of a batch's.
        kept: Of the model. Some modules put others in their place, for longer batches; the graph goes on reading these.
        loss, gradients: What the graph writes.
    """

    graph: Any
    read: list[Tensor]
    kept: list[Tensor]
    loss: Tensor
    gradients: Gradients

    def replay(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Gradients]:
        torch._foreach_copy_(self.read, list(tensors))
        self.graph.replay()
        return self.loss, self.gradients


class Recorder:
    """Computes losses and gradients of batches, from the third one of the same shapes on by a graph.

    The first batch of its shapes is computed as it comes, and so is the second one, with which the graph's result is
    compared: where it differs, or where nothing can be recorded, all others are too, and the log tells.

    Args:
        compute: Of a batch; called with tuples, lists, mappings and dataclasses of tensors, modules and plain values.
            It reads no other tensors but the model's, which are changed in place, and changes none. For a graph,
            mappings have their items and plain attributes alone.
        model: Whose tensors those are.
        draw: Called before each computation, for what is drawn at random in it.
        device: Where the tensors are; on a CPU nothing is recorded.
        memory: Bytes of the device that may be used; None is all.
        what: It is computed for, in words.
    """

    def __init__(
        self,
        compute: Callable[[Any], tuple[Tensor, Gradients]],
        model: nn.Module,
        draw: Callable[[], None],
        device: torch.device,
        memory: int | None,
        what: str,
    ) -> None:
        self._compute, self._model, self._draw = compute, model, draw
        self._device, self._memory, self._what = device, memory, what
        self._records = device.type == "cuda"
        self._pool: Any = None
        self._known: dict[Hashable, _Recording | None] = {}

    def __call__(self, batch: Any, there: Callable[[], Any] | None = None) -> tuple[Tensor, Gradients]:
        """The loss and the gradients of a batch; the next call may overwrite them.

        Args:
            batch: As it is computed without a graph.
            there: Returns the same with all tensors on the device, for a graph; None if they are there.
        """
        self._draw()
        if not self._records:
            return self._compute(batch)
        tensors: list[Tensor] = []
        try:
            moved = batch if there is None else there()
            key = _shapes(moved, tensors, self._device)
        except NotRecordableError as error:
            return self._without(str(error), self._compute(batch))
        known = self._known.get(key)
        if known is not None:
            return known.replay(tensors)
        found = self._compute(batch)
        if key in self._known:
            try:
                self._known[key] = self._record(moved, tensors, found)
            except NotRecordableError as error:
                return self._without(str(error), found)
        elif len(self._known) < _MOST:
            self._known[key] = None
        return found

    def forget(self) -> None:
        """Gives up all graphs, and the memory that they hold; nothing is recorded from here on."""
        self._known.clear()
        self._records = False

    def _without(self, why: str, found: tuple[Tensor, Gradients]) -> tuple[Tensor, Gradients]:
        self.forget()
        if distributed.rank() == 0:
            log.info("finish: %s is computed without a CUDA graph: %s", self._what, why)
        return found

    def _record(self, batch: Any, tensors: Sequence[Tensor], found: tuple[Tensor, Gradients]) -> _Recording:
        self._check_room()
        try:
            read, kept = [tensor.clone() for tensor in tensors], _tensors_of(self._model)
            places = iter(read)
            graph, (loss, gradients) = self._captured(_bare(map_tensors(batch, lambda _: next(places))))
            made = _Recording(graph, read, kept, loss, gradients)
            self._draw()
            made.replay(tensors)
            self._check_same(found, made)
        except Exception as error:  # the user's forward too, which may need tensors elsewhere
            _end_capture(self._device)
            raise NotRecordableError(str(error).strip().partition("\n")[0]) from error
        return made

    def _captured(self, batch: Any) -> tuple[Any, tuple[Tensor, Gradients]]:
        with torch.cuda.device(self._device):
            self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            with _workspaces_of_its_own(), torch.cuda.stream(side):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    made = self._compute(batch)
                finally:
                    _end(graph, self._device, self._pool)
            torch.cuda.current_stream().wait_stream(side)
        return graph, made

    def _check_room(self) -> None:
        peak, free = peak_bytes(self._device), free_bytes(self._device, self._memory)
        assert peak is not None and free is not None
        taken = peak - torch.cuda.memory_allocated(self._device)
        if _ROOM * taken > free:
            raise NotRecordableError(
                f"it takes {taken / 2**20:.0f} MiB, and {free / 2**20:.0f}, not {_ROOM} times that, are free"
            )

    def _check_same(self, found: tuple[Tensor, Gradients], made: _Recording) -> None:
        loss, gradients = found
        if [one is None for one in gradients] != [one is None for one in made.gradients]:
            raise NotRecordableError("the graph trains something else")
        pairs = [(a, b) for a, b in zip(gradients, made.gradients, strict=True) if a is not None and b is not None]
        apart = [(loss, made.loss), *pairs]
        norms = torch.stack([torch.stack([(a - b).float().norm(), a.float().norm()]) for a, b in apart]).tolist()
        of_loss, of_gradients = norms[0], [sum(x * x for x in part) ** 0.5 for part in zip(*norms[1:], strict=True)]
        for differs, size in (of_loss, of_gradients):
            if not differs <= _TOLERANCE * size:
                raise NotRecordableError(f"the graph's result differs by {differs:.2g} of {size:.2g}")


@contextlib.contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """Has cuBLAS take its memory anew for a capture, from the graph's, and forget it. It keeps some for each stream and
    thread to the end (32 MiB on Hopper), beside which those of the capture would be more than a process may use."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and what else modules have as attributes."""
    places = [place for one in modules_of(model).values() for place in (vars(one), one._parameters, one._buffers)]
    return [value for place in places for value in place.values() if isinstance(value, Tensor)]


def _end(graph: Any, device: torch.device, pool: Any) -> None:
    """Ends a capture. If CUDA finds it invalid, as one in which a value was read, PyTorch before 2.12 leaves its
    allocator in it: no memory would be given back to the device from there on, nor that of the capture be used again.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # it has been told
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        raise


def _end_capture(device: torch.device) -> None:
    """Has the device's random numbers be drawn as before a capture that failed: one that does not ends the state."""
    with torch.cuda.device(device):
        graph, side, number = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.zeros((), device=device)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="thread_local")
            number.add_(1)
            graph.capture_end()


def _shapes(value: Any, tensors: list[Tensor], device: torch.device) -> Hashable:
    """What is the same of all batches that a graph computes; adds a batch's tensors.

    Raises:
        NotRecordableError: It holds more than a graph can be given.
    """
    if isinstance(value, Tensor):
        if value.device != device:
            raise NotRecordableError(f"a tensor of its batches is on {value.device}")
        tensors.append(value)
        return (Tensor, value.shape, value.stride(), value.dtype)
    if _is_plain(value):
        return (type(value), value)
    return (type(value), tuple((name, _shapes(part, tensors, device)) for name, part in _parts(value)))


def _bare(batch: Any) -> Any:
    """The batch, a copy, without what its mappings have beside `_parts`, such as a tokenizer's encodings: whoever reads
    that fails, and in a graph would read the first batch's."""
    if isinstance(batch, UserDict):
        batch.__dict__ = dict(_parts(batch))
    if not _is_plain(batch) and not isinstance(batch, Tensor):
        for _, part in _parts(batch):
            _bare(part)
    return batch


def _is_plain(value: Any) -> bool:
    kinds = (bool, int, float, str, torch.dtype, torch.device, torch.Size, nn.Module)
    return value is None or isinstance(value, kinds)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, UserDict):
        return [(name, part) for name, part in vars(value).items() if name == "data" or _is_plain(part)]
    if isinstance(value, Mapping):
        return list(value.items())
    if type(value) in (list, tuple):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    raise NotRecordableError(f"a batch holds a {type(value).__name__}")
