"""Finished layers on their way home: `FinishedLayers`."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from gptq_plugin.layers.qlinear import QuantLinear


class LayerStore(Protocol):
    """Where finished layers are written as they come."""

    def add(self, name: str, layer: QuantLinear) -> None:
        """Takes a finished layer."""

    def written(self, name: str) -> dict[str, Tensor] | None:
        """Its tensors, mapped from their file; None while they are not there."""


class FinishedLayers:
    """Takes layers that were quantized on one device to the device their model lives on, in the background.

    With an export each layer is also handed to that, and a layer on the CPU lets go of its memory once it is in a
    file, so that the host's memory does not grow with the model.

    A layer keeps its tensors, wherever they are, until `settle` gives it others; that is called when nothing runs it.

    Args:
        device: The model's own.
        export: Where the layers are written as they come.
    """

    def __init__(self, device: torch.device, export: LayerStore | None) -> None:
        self.layers: dict[str, QuantLinear] = {}
        self._device = device
        self._export = export
        self._worker = ThreadPoolExecutor(1, "results")
        self._moving: dict[str, Future[dict[str, Tensor]]] = {}
        self._unwritten: set[str] = set()

    def add(self, name: str, layer: QuantLinear) -> None:
        """Takes a finished layer. Returns without waiting for its device.

        Raises:
            ExportError: An earlier layer could not be written.
        """
        self.layers[name] = layer
        tensors = {key: value.detach() for key, value in layer.named_buffers()}
        if layer.qweight.device == self._device:
            self._export_layer(name)
            return
        done = torch.cuda.current_stream(layer.qweight.device).record_event() if layer.qweight.is_cuda else None
        self._moving[name] = self._worker.submit(_move, tensors, self._device, done)

    def take_home(self, *, wait: bool = False) -> None:
        """Gives the layers the tensors that have arrived; with `wait`, all."""
        for name, moving in list(self._moving.items()):
            if wait or moving.done():
                del self._moving[name]
                _point(self.layers[name], moving.result())
                self._export_layer(name)
        if self._export is not None:
            for name in list(self._unwritten):
                mapped = self._export.written(name)
                if mapped is not None:
                    self._unwritten.discard(name)
                    _point(self.layers[name], mapped)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _export_layer(self, name: str) -> None:
        if self._export is not None:
            self._export.add(name, self.layers[name])
            if self._device.type == "cpu":
                self._unwritten.add(name)


def _point(layer: QuantLinear, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        setattr(layer, key, value)


def _move(tensors: dict[str, Tensor], device: torch.device, done: torch.cuda.Event | None) -> dict[str, Tensor]:
    """On the worker's thread, which alone waits for the copies; on a stream of its own, so that no work waits."""
    if done is None:
        return {key: value.to(device) for key, value in tensors.items()}
    source = next(iter(tensors.values())).device
    with torch.cuda.stream(torch.cuda.Stream(source)):
        done.wait(torch.cuda.current_stream(source))
        return {key: value.to(device) for key, value in tensors.items()}
