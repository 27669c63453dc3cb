"""A bound on the memory that suspended calibration batches hold on the device: `Activations`.

In lock-step every batch waits at the same layer with its residual stream, the layer's input and its masks in the local
variables of its forward. Those variables are out of reach, the memory under them is not: a dispatch mode on the batch's
thread sees every tensor an operation creates and remembers its storage weakly. When the batch waits, as many of the
storages still alive as the budget demands move to the host (`tracked_storage`); before it goes on they come back.

On a GPU the copies are on two streams beside the computation's, so that they overlap with other batches' kernels: to
the host when a batch starts to wait, and back while the batch before it runs.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_plugin.device.memory import with_index, with_room
from gptq_plugin.memory.tracked_storage import TrackedStorage, storage_key


class Activations:
    """Keeps the suspended batches' tensors on `device` up to a number of bytes, and the rest on the host.

    A batch that suspends keeps there as much as earlier ones left of the budget, its smallest storages first. Batches
    resume in the order they suspended, so the same ones stay each time.

    The batches run one at a time, as `lockstep.walk` has them. While one waits, its tensors hold no data: only
    operations of another batch (a mask cached on a module) and `on_device` bring them back. Code that reads memory
    without the dispatcher (a Triton kernel that is launched directly, a compiled region) must not read another batch's
    tensors; those it creates are not tracked, and stay.

    Args:
        device: Where the batches run. Storages elsewhere are left alone.
        budget: Bytes the suspended batches may keep on the device; None is all. Storages below `smallest` bytes, those
            that cannot be resized (foreign memory, shared memory) and those another batch has read stay in any case.
        prefetch: On a GPU, bring the bytes of the batch that has waited longest back while another runs; they count
            towards the budget.
        smallest: Storages with fewer bytes are not tracked at all.
        make_room: Called when an operation finds no room on the device, which then runs once more; returns False if
            nothing was left to free.

    Attributes:
        peak_bytes: The most bytes that the tracked storages of all batches waiting at one time held, on device and
            host.
        moved_bytes: Bytes copied to the host in total.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int | None,
        *,
        prefetch: bool = True,
        smallest: int = 2**20,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.peak_bytes = 0
        self.moved_bytes = 0
        self._device = with_index(device)
        self._budget = budget
        self._smallest = smallest
        self._make_room = make_room
        self._thread = threading.local()  # .number: of the batch this thread runs
        # One mode for all threads: torch keeps for the whole process whether another mode was active before, and
        # restores that from a stack on the mode. One mode a thread would leave it wrong when the threads end in turn.
        self._mode = _Mode(self)
        self._tracked: dict[int, dict[int, TrackedStorage]] = {}  # by batch and key
        is_gpu = device.type == "cuda"
        self._to_host = torch.cuda.Stream(device) if is_gpu else None
        self._to_device = torch.cuda.Stream(device) if is_gpu and prefetch else None
        self._on_host: dict[int, TrackedStorage] = {}  # by key, those of all batches whose bytes are on the host
        self._resident_bytes: dict[int, int] = {}  # on the device, by waiting batch; the longest waiting comes first
        self._held_bytes: dict[int, int] = {}  # on device and host, by waiting batch

    @contextlib.contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Around a batch's whole forward, on its thread: tensors that operations create inside belong to the batch."""
        self._tracked[number] = {}
        self._thread.number = number
        try:
            with self._mode:
                yield
        except BaseException as error:
            if self._hosted(number):  # it was cancelled: its variables need not come back only to go
                traceback.clear_frames(error.__traceback__)
            raise
        finally:
            self._thread.number = None
            for tracked in self._tracked.pop(number).values():  # a module that caches may hold one that is still away
                if tracked.host is not None:
                    self._bring(tracked)

    @contextlib.contextmanager
    def waiting(self, number: int) -> Iterator[None]:
        """Around one wait of a batch, on its thread: gives the memory away and takes it back.

        An exception thrown in (the batch is cancelled) leaves the bytes on the host until an operation needs them.

        Raises:
            torch.OutOfMemoryError: Host or device has no room for the bytes.
        """
        self._suspend(number)
        try:
            yield
        except BaseException:
            for tracked in self._hosted(number):
                tracked.wait()  # its memory may be freed now, which must not be while it is written to
            raise
        finally:
            del self._resident_bytes[number], self._held_bytes[number]
        for tracked in self._hosted(number):
            self._bring(tracked)
        self._prefetch_next()

    @contextlib.contextmanager
    def on_device(self, number: int) -> Iterator[None]:
        """For another thread, while the batch waits: inside, its tensors can be read (not written)."""
        hosted = self._hosted(number)
        try:
            for tracked in hosted:
                tracked.bring()
            yield
        finally:
            for tracked in hosted:
                tracked.empty()

    @contextlib.contextmanager
    def untracked(self) -> Iterator[None]:
        """Tensors created inside, on this thread, are not the batch's: a Hessian, or weights that a hook brings."""
        number, self._thread.number = self._number(), None
        try:
            yield
        finally:
            self._thread.number = number

    def keep_least(self) -> bool:
        """Moves all that waiting batches hold to the host, now and from now on; returns whether that is a change."""
        if self._budget == 0 and self._to_device is None:
            return False
        self._budget, self._to_device = 0, None
        for number in self._resident_bytes:
            for tracked in self._tracked[number].values():
                if tracked.can_move():
                    self._resident_bytes[number] -= tracked.bytes()
                    self._send(tracked)
        return True

    def live_bytes(self, number: int) -> int:
        """Bytes that the batch's tracked storages hold now, on device or host; 0 when it does not run."""
        return sum(tracked.bytes() for tracked in self._tracked.get(number, {}).values())

    def _number(self) -> int | None:
        return getattr(self._thread, "number", None)

    def _suspend(self, number: int) -> None:
        mine = {key: one for key, one in self._tracked[number].items() if one.storage() is not None}
        self._tracked[number] = mine
        live = stays = sum(tracked.bytes() for tracked in mine.values())
        if self._budget is not None:
            room = self._budget - sum(self._resident_bytes.values())
            for tracked in sorted(mine.values(), key=TrackedStorage.bytes, reverse=True):
                if stays <= room:
                    break
                if tracked.can_move():
                    stays -= tracked.bytes()
                    self._send(tracked)
        self._held_bytes[number], self._resident_bytes[number] = live, stays
        self.peak_bytes = max(self.peak_bytes, sum(self._held_bytes.values()))

    def _hosted(self, number: int) -> list[TrackedStorage]:
        return [tracked for tracked in self._tracked.get(number, {}).values() if tracked.host is not None]

    def _prefetch_next(self) -> None:
        """Starts to bring back the bytes that the batch which has waited longest has on the host."""
        if self._to_device is None or not self._resident_bytes:
            return
        number = next(iter(self._resident_bytes))
        with self.untracked():
            for tracked in self._hosted(number):
                if tracked.is_empty():
                    tracked.prefetch(self._to_device)
                    self._resident_bytes[number] += tracked.bytes()

    def _send(self, tracked: TrackedStorage) -> None:
        with self.untracked():
            tracked.send(self._to_host)
        self._on_host[tracked.key] = tracked
        self.moved_bytes += tracked.bytes()

    def _bring(self, tracked: TrackedStorage) -> None:
        with self.untracked():
            with_room(tracked.bring, self._make_room)
        tracked.host = None
        del self._on_host[tracked.key]

    def _read(self, *values: Any) -> None:
        """Called before an operation reads these: brings another batch's storage back from the host; it stays then."""
        if not self._on_host:
            return
        for tensor in _tensors_in(*values):
            tracked = self._on_host.get(storage_key(tensor))
            if tracked is None or not (tracked.is_empty() or tracked.is_coming()):
                continue
            if tracked.owner in self._resident_bytes and tracked.is_empty():
                self._resident_bytes[tracked.owner] += tracked.bytes()
            self._bring(tracked)
            tracked.shared = True

    def _created(self, number: int, out: Any, *inputs: Any) -> None:
        """Called when an operation returned `out`: tracks its tensors that share no memory with the inputs."""
        mine = self._tracked[number]
        for tensor in _tensors_in(out):
            if type(tensor) is not Tensor or tensor.device != self._device or tensor.layout is not torch.strided:
                continue  # a subclass's memory is that of the plain tensors inside it
            storage = tensor.untyped_storage()
            if storage.nbytes() < self._smallest or storage._cdata in mine:
                continue
            if storage._cdata not in map(storage_key, _tensors_in(*inputs)):
                mine[storage._cdata] = TrackedStorage(storage, number)


class _Mode(TorchDispatchMode):
    """Shows every operation on the threads where it is active to `Activations`, and changes none."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """torch.compile, and with it flex_attention, refuses to run inside any other mode."""
        return True

    def __init__(self, activations: Activations) -> None:
        super().__init__()
        self._activations = activations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._activations._read(args, kwargs)
        out = with_room(lambda: func(*args, **kwargs), self._activations._make_room)
        number = self._activations._number()
        if number is not None:
            self._activations._created(number, out, args, kwargs)
        return out


def _tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(*value)
        elif isinstance(value, dict):
            yield from _tensors_in(*value.values())
