"""Memory in which programs that share a tile leave their parts: `Workspace`, `workspace_of`.

Tested by tests/kernels/test_products.py: by its results.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_COUNTERS = 1 << 10  # of a stream: programs share tiles that are fewer than a GPU has room for
_SUPPLY = 1 << 20  # counters made at a time


class Workspace:
    """Parts and counters for products on one stream, which run one after the other.

    Counters are zero, and every product leaves them so. A product that is captured in a CUDA graph has its own, since
    graphs may run side by side. All are from a supply that was made before, and parts are the allocator's: nothing that
    is made during a product stays, which the graphs of torch.compile would not allow.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counters: Tensor | None = None

    def of(self, tiles: int, floats: int) -> tuple[Tensor, Tensor]:
        """Parts, float32, and counters, int32, for a product with so many tiles and numbers in its parts."""
        parts = torch.empty(floats, dtype=torch.float32, device=self._device)
        return parts, _take(self._device, tiles) if _captures(self._device) else self.counters(tiles)

    def counters(self, tiles: int) -> Tensor:
        """The stream's, also while it captures: for graphs that run one after the other."""
        if self._counters is None or len(self._counters) < tiles:
            self._counters = _take(self._device, max(tiles, _COUNTERS))
        return self._counters


_of_streams: dict[tuple[torch.device, int], Workspace] = {}
_supplies: dict[torch.device, Tensor] = {}
_taking = threading.Lock()


def workspace_of(device: torch.device) -> Workspace:
    """The workspace of the current stream of a GPU (or of the CPU, for Triton's interpreter)."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _of_streams.setdefault((device, stream), Workspace(device))


def prepare(device: torch.device) -> None:
    """Makes the supply of counters on a GPU, unless a graph is being captured."""
    with _taking:
        if device not in _supplies and not _captures(device):
            _make(device, _SUPPLY)


def _take(device: torch.device, number: int) -> Tensor:
    """Counters that nobody else has; where none are left while a graph is captured, they are zeroed in the graph."""
    with _taking:
        if device not in _supplies or len(_supplies[device]) < number:
            if _captures(device):
                return torch.zeros(number, dtype=torch.int32, device=device)
            _make(device, max(number, _SUPPLY))
        taken, _supplies[device] = _supplies[device][:number], _supplies[device][number:]
        return taken


def _make(device: torch.device, number: int) -> None:
    _supplies[device] = torch.zeros(number, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams use it


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
