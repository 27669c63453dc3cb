"""Free and used memory of a device and of the host, and a device's index."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gptq_plugin.device.cycles import collect
from gptq_plugin.device.modules import modules_of

T = TypeVar("T")

_CPU = torch.device("cpu")
_GROWTH = 2**27  # bytes
_FEW = 32  # a device's memory is to what may be left in cycles of objects
_ENOUGH = 3  # and to what is free beside that which the allocator holds
_LARGE = 2**20  # bytes of tensors; what fewer leave behind is little
_SHORT = re.compile(  # cuSOLVER tells of no room for its handle as of an internal error
    r"(CUDA|HIP) error: out of memory|Triton Error \[\w+\]: out of memory|"
    r"_STATUS_ALLOC_FAILED|calling `cusolverDnCreate\("
)


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


def give_back(device: torch.device, own: int | None = None) -> None:
    """Gives back what the allocator holds on a device and no tensor needs, after training or other work.

    Args:
        device: Nothing is to be done on a CPU.
        own: Bytes of tensors on the device that are known to be needed. Where hardly more are there, none can wait in
            cycles of objects, among which Python would look for as long as it takes to quantize a block of experts.
            What is held stays where a third of the device is free beside it, since to ask for it again takes time.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if own is None or torch.cuda.memory_allocated(device) - own > total // _FEW:
        collect()
    if own is None or free < total // _ENOUGH:
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def trim(device: torch.device = _CPU) -> None:
    """Returns freed memory of the host to the system, if that is where work was done. glibc keeps that of tensors below
    32 MB and, once small objects lie between, hardly reuses it: a process that frees a layer for each new one would
    grow nevertheless."""
    if device.type != "cpu":
        return
    release = _malloc_trim()
    if release is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Any:
    """glibc's function; None of other C libraries. Looking it up leaves cycles of objects."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def own_bytes() -> int:
    """Bytes of memory that this process has on the host, mapped files aside; 0 where the system does not tell."""
    try:
        _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int | None:
    """Bytes of the host's memory that this process can still take without swapping, within its cgroup; None where the
    system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().partition("::")[2].strip().lstrip("/")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(0, most - used))
    return min(found, default=None)


@contextlib.contextmanager
def trimmed(model: nn.Module) -> Iterator[None]:
    """Inside the block, memory that forwards on a CPU freed goes back to the system whenever the process has grown by
    `_GROWTH`. Without it a forward in 16 bits leaves as much behind as its weights take, and they may be mapped.

    Args:
        model: Any module. The hooks on its parts are gone after the block.
    """
    least = own_bytes()

    def look(*_: Any) -> None:
        nonlocal least
        now = own_bytes()
        least = min(least, now)
        if now > least + _GROWTH:
            trim()
            least = own_bytes()

    hooks = [module.register_forward_hook(look) for module in _large_parts(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _large_parts(model: nn.Module) -> list[nn.Module]:
    """The modules with a large tensor on a CPU, and the smallest ones whose smaller tensors are as much together."""
    sizes: dict[nn.Module, int] = {}
    found = []
    for module in reversed(modules_of(model).values()):  # children first
        tensors = (*module._parameters.values(), *module._buffers.values())
        own = [one.nbytes for one in tensors if one is not None and one.device.type == "cpu"]
        parts = [sizes.get(child, 0) for child in module._modules.values() if child is not None]
        sizes[module] = sum(own) + sum(parts)
        if max(own, default=0) >= _LARGE or (sizes[module] >= _LARGE and max(parts, default=0) < _LARGE):
            found.append(module)
    return found


def is_shortage(error: BaseException) -> bool:
    """Returns whether a device had no room: for a tensor, in PyTorch's allocator, or for what drivers and libraries
    take beside it, such as a kernel's code or a handle. They find none where other processes fill the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _SHORT.search(str(error)) is not None


def with_room(run: Callable[[], T], make_room: Callable[[], bool]) -> T:
    """Runs something, and where the device has no room for it, once more after `make_room`.

    Args:
        run: Changes nothing before it has the memory it needs, such as an operation of PyTorch.
        make_room: Frees memory; returns False if no tensors were left to free. Memory that PyTorch holds and no tensor
            needs, which it gives back, is no room for another tensor, but may be for a driver.

    Raises:
        RuntimeError: There is no room even then: torch.OutOfMemoryError, or another that `is_shortage` knows.
    """
    try:
        return run()
    except RuntimeError as error:
        if not is_shortage(error) or (not make_room() and isinstance(error, torch.OutOfMemoryError)):
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
