"""Peaks of memory and disk of one host, watched from a thread: `Peaks`."""

from __future__ import annotations

import re
import shutil
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

_PAUSE = 0.2  # seconds between two readings
_GB = 1e9


class Peaks:
    """Reads what this process, the host and a disk hold, and keeps the largest values; the thread ends with it.

    Args:
        folder: Somewhere on the disk; what it held before is left out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.parent  # the folder itself may go first
        self._disk_before = shutil.disk_usage(folder).used
        self._largest: dict[str, float] = {}
        self._in_all: dict[str, float] = {}
        threading.Thread(target=self._watch, daemon=True, name="peaks").start()

    def since_last(self) -> str:
        """Peaks since this was called last, in GB; that of the GPU since the start."""
        self._read()
        told = ", ".join(f"{name} {value / _GB:.1f}" for name, value in self._largest.items())
        self._largest = {}
        return f"GB: {told}"

    def of_all_ranks(self) -> str:
        """The largest of each over the whole run and all ranks, in GB; the processes' own memory added up."""
        everyones = [self._in_all]
        if dist.is_available() and dist.is_initialized():
            everyones = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyones, self._in_all)
        peaks = {name: max(one.get(name, 0.0) for one in everyones) for name in self._in_all}
        own = sum(one["own"] for one in everyones)
        told = ", ".join(f"{name} {value / _GB:.1f}" for name, value in peaks.items())
        return f"GB: {told}, own of all ranks {own / _GB:.1f}"

    def _watch(self) -> None:
        while True:
            self._read()
            time.sleep(_PAUSE)

    def _read(self) -> None:
        memory = {name: 1024 * int(kb) for name, kb in re.findall(r"^(\S+): +(\d+) kB", _text("/proc/meminfo"), re.M)}
        cached = memory["Cached"] + memory["Buffers"] + memory["SReclaimable"]
        values = {
            "own": 1024.0 * int(re.findall(r"RssAnon:\s+(\d+) kB", _text("/proc/self/status"))[0]),
            "host without caches": float(memory["MemTotal"] - memory["MemFree"] - cached),
            "page cache": float(cached),
            "disk": float(shutil.disk_usage(self._folder).used - self._disk_before),
            "GPU": _gpu_peak(),
        }
        for name, value in values.items():
            self._largest[name] = max(self._largest.get(name, 0.0), value)
            self._in_all[name] = max(self._in_all.get(name, 0.0), value)


def _text(path: str) -> str:
    return Path(path).read_text(encoding="ascii")


def _gpu_peak() -> float:
    """Bytes of tensors on this process's GPU at most, since its start."""
    if not torch.cuda.is_initialized():
        return 0.0
    return float(max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())))
