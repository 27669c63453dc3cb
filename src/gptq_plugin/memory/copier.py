"""Copies of tensors on a device, made on a thread and a stream beside the computation: `Copier`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from gptq_plugin.memory.slots import like

_T = TypeVar("_T")
Copies = dict[int, Tensor]  # by the id of the original
Transfer = Future[tuple[Copies, torch.cuda.Event | None]]  # copies on their way, and when they have arrived


class Copier:
    """One thread that copies tensors to the device, with its own CUDA stream.

    No copy is made on a batch's thread: modes that are active there, such as the one that tracks the batch's
    activations, must not see it.

    Args:
        device: A CPU, or a GPU with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._freed: torch.cuda.Event | None = None

    def start(self, tensors: Mapping[int, Tensor]) -> Transfer:
        """Starts to copy the tensors, given by their id."""
        return self._pool.submit(self._copy, tensors, self._freed)

    def result(self, transfer: Transfer) -> Copies:
        """The copies, ready for the current stream; raises the thread's error."""
        tensors, arrived = transfer.result()
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            for tensor in tensors.values():
                tensor.record_stream(current)  # its memory belongs to the copying stream
        return tensors

    def call(self, function: Callable[[], _T]) -> _T:
        """Runs the function on the thread, on the caller's stream, and waits for it to return."""
        stream = torch.cuda.current_stream(self._device) if self._stream is not None else None

        def run() -> _T:
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                return function()

        return self._pool.submit(run).result()

    def note_freed(self) -> None:
        """Has later copies wait for the work queued on the current stream, which may still read freed memory."""
        if self._stream is not None:
            self._freed = torch.cuda.Event(blocking=True)
            self._freed.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _copy(
        self, tensors: Mapping[int, Tensor], freed: torch.cuda.Event | None
    ) -> tuple[Copies, torch.cuda.Event | None]:
        copies: Copies = {}
        if self._stream is None:
            for key, tensor in tensors.items():
                copies[key] = like(tensor, tensor.detach().to(self._device, copy=True))
            return copies, None
        if freed is not None:
            freed.synchronize()
        with torch.cuda.stream(self._stream):
            for key, tensor in tensors.items():
                pinned = tensor.detach().pin_memory() if tensor.device.type == "cpu" else tensor.detach()
                copies[key] = like(tensor, pinned.to(self._device, non_blocking=True))
            return copies, self._stream.record_event()
