"""A bound on what suspended calibration batches hold on the device.

In lock-step every batch waits at the same layer with its residual stream, the layer's input and its masks in the
local variables of its forward. Those variables are out of reach, the memory under them is not: a dispatch mode on
the batch's thread sees every tensor an operation creates and remembers its storage weakly. When the batch waits, as
many of the storages still alive as the budget demands are copied to the host (pinned, if the device is a GPU) and
resized to zero bytes; before it goes on they get their size and bytes back. Tensors, views and versions do not notice.

Memory is taken and given back in the order of the current stream of the thread that waits. On a GPU the copies
themselves are on two streams of their own, so that they overlap with other batches' kernels: to the host when a batch
starts to wait, and back while the batch before it runs.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Activations:
    """Keeps the suspended batches' tensors on `device` up to a number of bytes, and the rest on the host.

    Of each batch that suspends as much stays as the batches suspended before it left of the budget, the smallest
    storages first. Batches resume in the order they suspended, so the same ones stay each time.

    The batches run one at a time, as `lockstep.walk` has them. While one waits, its tensors hold no data: only
    operations of another batch (a mask cached on a module) and `on_device` bring them back. What reads memory behind
    the dispatcher's back (a Triton kernel that is launched directly, a compiled region) must not read another batch's
    tensors; what it creates is not tracked, and stays.

    Args:
        device: Where the batches run. Storages elsewhere are left alone.
        budget: Bytes the suspended batches may keep on the device; None: all. Storages below `smallest` bytes, those
            that cannot be resized (foreign memory, shared memory) and those another batch has read stay in any case.
        ahead: On a GPU, whether the bytes of the batch that has waited longest come back while another runs; they are
            within the budget, as far as they fit.
        smallest: Storages with fewer bytes are not tracked at all.

    Attributes:
        peak: The most bytes that the tracked storages of all batches waiting at one time held, on device and host.
        moved: Bytes copied to the host in total.
    """

    def __init__(self, device: torch.device, budget: int | None, *, ahead: bool = True, smallest: int = 2**20):
        self.device = torch.empty(0, device=device).device  # with its index, as tensors have it
        self.budget = budget
        self.peak = 0
        self.moved = 0
        self._smallest = smallest
        self._here = threading.local()  # .number: of the batch this thread runs
        # One mode for all threads: whether another mode was active before is kept by torch for the whole process and
        # restored from a stack on the mode. With a mode for each thread it would be left wrong when they end in turn.
        self._mode = _Mode(self)
        self._tracked: dict[int, dict[int, _Tracked]] = {}  # by batch and address of the storage object
        is_gpu = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if is_gpu else None  # carries bytes to the host
        self._back = torch.cuda.Stream(device) if is_gpu and ahead else None
        self._away: dict[int, _Tracked] = {}  # of all batches, those whose bytes are on the host
        self._resident: dict[int, int] = {}  # bytes on the device, by waiting batch; who waits longest comes first
        self._live: dict[int, int] = {}  # bytes on device and host, by waiting batch

    @contextlib.contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Around a batch's whole forward, on its thread: what operations create inside is the batch's."""
        self._tracked[number] = {}
        self._here.number = number
        try:
            with self._mode:
                yield
        except BaseException as error:
            if self._hosted(number):  # it was cancelled: its variables need not come back only to go
                traceback.clear_frames(error.__traceback__)
            raise
        finally:
            self._here.number = None
            mine = self._tracked.pop(number)
            for tracked in mine.values():  # what is still away and alive somebody else may hold: a module that caches
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
                tracked.arrive()  # its memory may be freed now, which must not be while it is written to
            raise
        finally:
            del self._resident[number], self._live[number]
        for tracked in self._hosted(number):
            self._bring(tracked)
        self._fetch_next()

    @contextlib.contextmanager
    def on_device(self, number: int) -> Iterator[None]:
        """For another thread, while the batch waits: inside, its tensors can be read (not written)."""
        hosted = self._hosted(number)
        try:
            for tracked in hosted:
                tracked.fill()
            yield
        finally:
            for tracked in hosted:
                tracked.empty()

    @contextlib.contextmanager
    def untracked(self) -> Iterator[None]:
        """What is created inside, on this thread, is not the batch's: a Hessian, or weights that a hook brings."""
        number, self._here.number = self._number(), None
        try:
            yield
        finally:
            self._here.number = number

    def live(self, number: int) -> int:
        """The bytes that the batch's tracked storages hold now, on device or host; 0 when it does not run."""
        return sum(tracked.bytes() for tracked in self._tracked.get(number, {}).values())

    def _number(self) -> int | None:
        return getattr(self._here, "number", None)

    def _suspend(self, number: int) -> None:
        mine = {key: one for key, one in self._tracked[number].items() if one.storage() is not None}
        self._tracked[number] = mine
        live = stays = sum(tracked.bytes() for tracked in mine.values())
        if self.budget is not None:
            room = self.budget - sum(self._resident.values())
            for tracked in sorted(mine.values(), key=_Tracked.bytes, reverse=True):
                if stays <= room:
                    break
                if tracked.can_move():
                    stays -= tracked.bytes()
                    self._send(tracked)
        self._live[number], self._resident[number] = live, stays
        self.peak = max(self.peak, sum(self._live.values()))

    def _hosted(self, number: int) -> list[_Tracked]:
        return [tracked for tracked in self._tracked.get(number, {}).values() if tracked.host is not None]

    def _fetch_next(self) -> None:
        """Starts to bring back what the batch that has waited longest has on the host."""
        if self._back is None or not self._resident:
            return
        number = next(iter(self._resident))
        with self.untracked():
            for tracked in self._hosted(number):
                if tracked.is_empty():
                    tracked.fetch(self._back)
                    self._resident[number] += tracked.bytes()

    def _send(self, tracked: _Tracked) -> None:
        with self.untracked():
            tracked.save(self._out)
        self._away[tracked.key] = tracked
        self.moved += tracked.bytes()

    def _bring(self, tracked: _Tracked) -> None:
        with self.untracked():
            tracked.fill()
        tracked.host = None
        del self._away[tracked.key]

    def _read(self, *values: Any) -> None:
        """An operation is about to read these: another batch's storage that is away comes back, and stays."""
        if not self._away:
            return
        for tensor in _tensors(*values):
            tracked = self._away.get(_key(tensor))
            if tracked is None or not (tracked.is_empty() or tracked.is_coming()):
                continue
            if tracked.owner in self._resident and tracked.is_empty():
                self._resident[tracked.owner] += tracked.bytes()
            self._bring(tracked)
            tracked.shared = True

    def _created(self, number: int, out: Any, *inputs: Any) -> None:
        """An operation returned `out`: what does not share memory with its inputs is the batch's."""
        mine = self._tracked[number]
        for tensor in _tensors(out):
            if type(tensor) is not Tensor or tensor.device != self.device or tensor.layout is not torch.strided:
                continue  # a subclass's memory is that of the plain tensors inside it
            storage = tensor.untyped_storage()
            if storage.nbytes() < self._smallest or storage._cdata in mine:
                continue
            if storage._cdata not in map(_key, _tensors(*inputs)):
                mine[storage._cdata] = _Tracked(storage, number)


class _Mode(TorchDispatchMode):
    """Shows every operation on the threads where it is active to `Activations`, and changes none."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """torch.compile, and with it flex_attention, refuses to run inside any other mode."""
        return True

    def __init__(self, activations: Activations):
        super().__init__()
        self._activations = activations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._activations._read(args, kwargs)
        out = func(*args, **kwargs)
        number = self._activations._number()
        if number is not None:
            self._activations._created(number, out, args, kwargs)
        return out


class _Tracked:
    """One storage, remembered without keeping it alive, and its bytes while they are on the host.

    The weak reference keeps the address of the storage object, `key`, from being used again, so a storage that died
    is never taken for a later one.
    """

    def __init__(self, storage: UntypedStorage, owner: int):
        self.key: int = storage._cdata
        self.owner = owner
        self.host: Tensor | None = None
        self.shared = False  # read by another batch
        self._saved: torch.cuda.Event | None = None
        self._coming: torch.cuda.Event | None = None
        self._ref = StorageWeakRef(storage)

    def storage(self) -> UntypedStorage | None:
        return UntypedStorage._new_with_weak_ptr(self.key)

    def bytes(self) -> int:
        """What the storage holds on device or host; 0 when it is gone."""
        storage = self.storage()
        if storage is None:
            return 0
        return self.host.nbytes if self.host is not None else storage.nbytes()

    def is_empty(self) -> bool:
        """Whether the bytes are on the host only; False while they are being copied."""
        storage = self.storage()
        return storage is not None and storage.nbytes() == 0

    def is_coming(self) -> bool:
        """Whether the bytes are on their way back, ahead of their use."""
        return self._coming is not None

    def can_move(self) -> bool:
        storage = self.storage()
        if storage is None or self.host is not None or self.shared or not storage.resizable():
            return False
        return storage.device.type != "cpu" or not storage.is_shared()  # is_shared() is true of all CUDA storages

    def save(self, stream: torch.cuda.Stream | None) -> None:
        """Copies the bytes to the host and gives the memory back to the device; on a GPU on a stream of their own, so
        that other batches run meanwhile."""
        storage = self.storage()
        if storage is None:
            return
        source = _bytes(storage)
        self.host = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(source)
        else:
            stream.wait_stream(torch.cuda.current_stream(source.device))
            with torch.cuda.stream(stream):
                self.host.copy_(source, non_blocking=True)
            source.record_stream(stream)  # its memory is used again only after that
            self._saved = stream.record_event()
        del source
        storage.resize_(0)

    def fill(self) -> None:
        """Takes memory on the device and copies the bytes back."""
        storage = self.storage()
        if storage is None or self.host is None:
            return
        if self._coming is not None:
            self.arrive()
            return
        if self._saved is not None:
            self._saved.wait(torch.cuda.current_stream(storage.device))
        storage.resize_(self.host.nbytes)
        _bytes(storage).copy_(self.host, non_blocking=True)

    def fetch(self, stream: torch.cuda.Stream) -> None:
        """Starts `fill` on another stream; the bytes can be used after `arrive`."""
        storage = self.storage()
        if storage is None or self.host is None:
            return
        storage.resize_(self.host.nbytes)  # belongs to the current stream, which may be using it for something else yet
        stream.wait_stream(torch.cuda.current_stream(storage.device))
        if self._saved is not None:
            self._saved.wait(stream)
        with torch.cuda.stream(stream):
            _bytes(storage).copy_(self.host, non_blocking=True)
        self._coming = stream.record_event()

    def arrive(self) -> None:
        """Has the current stream wait for what `fetch` started."""
        if self._coming is not None:
            self._coming.wait(torch.cuda.current_stream(self._coming.device))
            self._coming = None

    def empty(self) -> None:
        """After `fill`, when the bytes on the host are still the batch's."""
        storage = self.storage()
        if storage is not None:
            storage.resize_(0)


def _bytes(storage: UntypedStorage) -> Tensor:
    """All of a storage, uint8, [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _key(tensor: Tensor) -> int:
    """The address of the tensor's storage object; 0 for a layout that has none."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def _tensors(*values: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())
