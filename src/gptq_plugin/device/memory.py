"""Free and used memory of a device, and its index."""

from __future__ import annotations

import torch


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
    unused = torch.cuda.memory_reserved(device) - allocated  # reserved by this process, and free in it
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - allocated
    return max(0, min(free + unused, allowed, allowed if limit is None else limit - allocated))


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
