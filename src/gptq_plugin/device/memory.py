"""Free and used memory of a device, and its index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from gptq_plugin.device.cycles import collect

T = TypeVar("T")


def free_bytes(device: torch.device, limit: int | None = None) -> int | None:
    """Bytes this process can still allocate on the device; None on a CPU, where that is not limited.

    Args:
        device: Any device.
        limit: Bytes of tensors that may be there in all; None is all that fit.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    # Reserved by this process, and free in it: in whole segments, which the allocator can give back, or in gaps between
    # tensors, which are too small for most.
    gaps = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    unused = torch.cuda.memory_reserved(device) - allocated - gaps
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - allocated - gaps
    return max(0, min(free + unused, allowed, allowed if limit is None else limit - allocated))


def give_back(device: torch.device) -> None:
    """Gives back what the allocator holds on a device and no tensor needs, after training or other work."""
    if device.type == "cuda":
        collect()
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def with_room(run: Callable[[], T], make_room: Callable[[], bool]) -> T:
    """Runs something, and where the device has no room for it, once more after `make_room`.

    Args:
        run: Changes nothing before it has the memory it needs, such as an operation of PyTorch.
        make_room: Frees memory; returns False if nothing was left to free.

    Raises:
        torch.OutOfMemoryError: There is no room even then.
    """
    try:
        return run()
    except torch.OutOfMemoryError:
        if not make_room():
            raise
    return run()


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes of tensors that were on the device at a time so far; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class Peak:
    """Measures the most bytes allocated on a device beyond those that were there when it was made; 0 on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def bytes(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self._device) - self._before


def with_index(device: torch.device) -> torch.device:
    """A GPU with its index, which the devices of tensors have; any other device unchanged."""
    no_index = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if no_index else device
