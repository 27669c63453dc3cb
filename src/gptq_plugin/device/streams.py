"""Values and times of a device that are read without holding it up, and work beside other work on it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class AsyncRead:
    """A small tensor on its way to the host.

    Args:
        tensor: Copied behind the work that is queued on its device's current stream; on a CPU it is there at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()

    def get(self) -> Any:
        """The values, as `Tensor.tolist`. Waits for what was queued before the copy, not for what came after."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class Stopwatch:
    """Seconds of a device's work, from here to `stop`; a GPU may get to it later.

    Args:
        device: Whose time is taken, on its current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [self._mark()]

    def stop(self) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """After `stop`; waits until the device was there."""
        start, end = self._marks
        if isinstance(start, float) and isinstance(end, float):
            return end - start
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark


@contextlib.contextmanager
def on_side_stream(device: torch.device) -> Iterator[Callable[[], None]]:
    """Has what the block queues run beside what is queued after it: a GPU has room next to a chain of small kernels.

    Yields:
        To be called before the block's results are used, or what it read is freed or changed.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield lambda: current.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one a device: each keeps memory of its own
