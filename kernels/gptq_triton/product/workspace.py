"""Memory in which programs that share a tile leave their parts: `Workspace`, `workspace_of`.

Tested by tests/kernels/test_products.py: by its results.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COUNTERS = 1 << 14  # of a stream: a product has fewer tiles where several programs share one
_CAPTURED = 1 << 20  # of all products captured in graphs


class Workspace:
    """Parts and counters for products on one stream, which run one after the other.

    Counters are zero, and every product leaves them so. A product that is captured in a CUDA graph has its own, since
    graphs may run side by side: from a supply that was zeroed before, or, once that is used up, zeroed in the graph.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counters: Tensor | None = None
        self._parts: Tensor | None = None

    def of(self, tiles: int, floats: int) -> tuple[Tensor, Tensor]:
        """Parts, float32, and counters, int32, for a product with so many tiles and numbers in its parts."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.empty(floats, device=self._device), _captured_counters(self._device, tiles)
        return self.kept(tiles, floats)

    def kept(self, tiles: int, floats: int) -> tuple[Tensor, Tensor]:
        """The stream's own parts and counters, made longer where they are too short."""
        if self._parts is None or self._parts.numel() < floats:
            self._parts = torch.empty(floats, device=self._device)
        if self._counters is None or len(self._counters) < tiles:
            self._counters = torch.zeros(max(tiles, _COUNTERS), dtype=torch.int32, device=self._device)
        return self._parts, self._counters


_of_streams: dict[tuple[torch.device, int], Workspace] = {}
_supplies: dict[torch.device, Tensor] = {}


def workspace_of(device: torch.device) -> Workspace:
    """The workspace of the current stream of a GPU (or of the CPU, for Triton's interpreter)."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _of_streams.setdefault((device, stream), Workspace(device))


def prepare(device: torch.device) -> None:
    """Makes the supply of counters for graphs on a GPU, unless a graph is being captured."""
    if device.type == "cuda" and device not in _supplies and not torch.cuda.is_current_stream_capturing():
        _supplies[device] = torch.zeros(_CAPTURED, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # other streams use it


def _captured_counters(device: torch.device, tiles: int) -> Tensor:
    supply = _supplies.get(device)
    if supply is None or len(supply) < tiles:
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    _supplies[device] = supply[tiles:]
    return supply[:tiles]
