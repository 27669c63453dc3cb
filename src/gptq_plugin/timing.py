"""Figures a device will have once it gets there: values and times that are read without holding it up."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Fetched:
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
