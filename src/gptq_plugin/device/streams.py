"""Reads values and times of a device without stalling it, and queues work on a side stream."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class AsyncRead:
    """Copies a small tensor to the host behind the work queued on its device's current stream.

    Args:
        tensor: Any tensor; one on a CPU is not copied.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        self._values: Any = None  # once they were asked for
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()

    def get(self) -> Any:
        """The values, as `Tensor.tolist`. Waits for work queued before the copy, not for later work."""
        if self._values is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._values = self._host.tolist()
        return self._values


class Stopwatch:
    """Measures the seconds a device takes for the work queued between construction and `stop`.

    Args:
        device: The device; of a GPU, its current stream is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [self._mark()]
        self._seconds: float | None = None  # once they were asked for

    def stop(self) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """The seconds. To be called after `stop`; waits until the device has got there."""
        if self._seconds is None:
            start, end = self._marks
            if isinstance(start, float) and isinstance(end, float):
                self._seconds = end - start
            else:
                end.synchronize()
                self._seconds = float(start.elapsed_time(end)) / 1000
        return self._seconds

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark


@contextlib.contextmanager
def on_side_stream(device: torch.device) -> Iterator[Callable[[], None]]:
    """Queues the block on a side stream, so that it overlaps with later work: small kernels leave most of a GPU idle.

    Yields:
        A function that has the current stream wait for the block, not for later ones. To be called behind the block,
        before its results are used, or a tensor it read is freed or changed.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    done = torch.cuda.Event()
    with torch.cuda.stream(side):
        yield lambda: current.wait_event(done)
        done.record(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one per device, as the allocator keeps separate memory for each stream
