"""A storage whose bytes can wait on the host: `TrackedStorage`."""

from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef


class TrackedStorage:
    """One storage, remembered without keeping it alive, and its bytes while they are on the host.

    The storage is resized to zero bytes meanwhile. Tensors, views and versions do not notice. Memory is taken and given
    back in the order of the current stream; the copies may be on other streams.

    Args:
        storage: The storage.
        owner: Number of the batch that created it.

    Attributes:
        key: Address of the storage object. The weak reference keeps it from being used again, so a storage that died is
            never taken for a later one.
        owner: As given.
        host: The bytes on the host, uint8, pinned on a GPU; None while they are on the device only.
        shared: True once another batch has read it.
    """

    def __init__(self, storage: UntypedStorage, owner: int) -> None:
        self.key: int = storage._cdata
        self.owner = owner
        self.host: Tensor | None = None
        self.shared = False
        self._on_host: torch.cuda.Event | None = None
        self._on_device: torch.cuda.Event | None = None  # only while a prefetch is under way
        self._ref = StorageWeakRef(storage)

    def storage(self) -> UntypedStorage | None:
        return UntypedStorage._new_with_weak_ptr(self.key)

    def bytes(self) -> int:
        """Size of the storage, wherever its bytes are; 0 when it is gone."""
        storage = self.storage()
        if storage is None:
            return 0
        return self.host.nbytes if self.host is not None else storage.nbytes()

    def is_empty(self) -> bool:
        """True while the bytes are on the host only; False already while they are being copied back."""
        storage = self.storage()
        return storage is not None and storage.nbytes() == 0

    def is_coming(self) -> bool:
        """True while the bytes are on their way back, ahead of their use."""
        return self._on_device is not None

    def can_move(self) -> bool:
        storage = self.storage()
        if storage is None or self.host is not None or self.shared or not storage.resizable():
            return False
        return storage.device.type != "cpu" or not storage.is_shared()  # is_shared() is true of all CUDA storages

    def send(self, stream: torch.cuda.Stream | None) -> None:
        """Copies the bytes to the host and gives the memory back to the device.

        Args:
            stream: The GPU stream that copies, so that other batches run meanwhile; None on a CPU.
        """
        storage = self.storage()
        if storage is None:
            return
        source = _bytes_of(storage)
        self.host = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(source)
        else:
            stream.wait_stream(torch.cuda.current_stream(source.device))
            with torch.cuda.stream(stream):
                self.host.copy_(source, non_blocking=True)
            source.record_stream(stream)  # its memory is used again only after that
            self._on_host = stream.record_event()
        del source
        storage.resize_(0)

    def bring(self) -> None:
        """Takes memory on the device and copies the bytes back, or waits for `prefetch`. `host` stays."""
        storage = self.storage()
        if storage is None or self.host is None:
            return
        if self._on_device is not None:
            self.wait()
            return
        if self._on_host is not None:
            self._on_host.wait(torch.cuda.current_stream(storage.device))
        storage.resize_(self.host.nbytes)
        _bytes_of(storage).copy_(self.host, non_blocking=True)

    def prefetch(self, stream: torch.cuda.Stream) -> None:
        """Starts `bring` on another stream; the bytes can be used after `wait`."""
        storage = self.storage()
        if storage is None or self.host is None:
            return
        storage.resize_(self.host.nbytes)  # memory of the current stream, which may still use it otherwise
        stream.wait_stream(torch.cuda.current_stream(storage.device))
        if self._on_host is not None:
            self._on_host.wait(stream)
        with torch.cuda.stream(stream):
            _bytes_of(storage).copy_(self.host, non_blocking=True)
        self._on_device = stream.record_event()

    def wait(self) -> None:
        """Has the current stream wait for the bytes that `prefetch` brings."""
        if self._on_device is not None:
            self._on_device.wait(torch.cuda.current_stream(self._on_device.device))
            self._on_device = None

    def empty(self) -> None:
        """Gives the memory back after `bring`, while `host` still holds the bytes."""
        storage = self.storage()
        if storage is not None:
            storage.resize_(0)


def storage_key(tensor: Tensor) -> int:
    """Address of the tensor's storage object; 0 for a layout that has none."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def _bytes_of(storage: UntypedStorage) -> Tensor:
    """The whole storage, uint8, [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
