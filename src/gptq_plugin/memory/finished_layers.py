"""Moves finished layers to their model's device, in the background: `FinishedLayers`."""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from gptq_plugin.layers.qlinear import QuantLinear


class LayerStore(Protocol):
    """Files to which finished layers are written as they come, one after the other."""

    def add(self, name: str, layer: QuantLinear) -> None:
        """Takes a finished layer, on the model's device."""

    def written(self, name: str) -> dict[str, Tensor] | None:
        """The layer's tensors, mapped from a file; None until one is there."""

    def lasts(self, name: str) -> bool:
        """Returns whether that file is the layer's last one."""


class FinishedLayers:
    """Moves layers from the device that quantized them to the device of their model.

    With a store each layer is also written, and a layer on the CPU lets go of its memory once it is in a file, so that
    the host's memory does not grow with the model.

    A layer keeps its tensors, wherever they are, until `take_home` gives it others; that is called while no batch runs.

    Args:
        device: The model's.
        store: Takes the layers as they come.

    Attributes:
        layers: All layers so far, by name.
    """

    def __init__(self, device: torch.device, store: LayerStore | None) -> None:
        self.layers: dict[str, QuantLinear] = {}
        self._device = device
        self._store = store
        self._worker = ThreadPoolExecutor(1, "finished-layers")
        self._moving: dict[str, Future[dict[str, Tensor]]] = {}
        self._unwritten: dict[str, None] = {}  # in their order
        self._waiting: dict[str, None] = {}  # mapped from a file that is not their last, in their order

    def add(self, name: str, layer: QuantLinear) -> None:
        """Takes a finished layer. Returns without waiting for its device.

        Raises:
            ExportError: An earlier layer could not be written.
        """
        self.layers[name] = layer
        device = layer.device
        if device == self._device:
            self._write(name)
            return
        tensors = {key: value.detach() for key, value in layer.named_buffers()}
        done = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._moving[name] = self._worker.submit(_move, tensors, self._device, done)

    def take_home(self, *, wait: bool = False) -> None:
        """Gives the layers their tensors that have arrived; with `wait`, waits for all."""
        for name, moving in list(self._moving.items()):
            if wait or moving.done():
                del self._moving[name]
                _point(self.layers[name], moving.result())
                self._write(name)
        if self._store is not None:
            self._map(self._store)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _map(self, store: LayerStore) -> None:
        """Has layers take the tensors that are in files by now. Files get the layers in their order, so that none
        behind one that is in no file has to be asked about."""
        for name in list(itertools.takewhile(store.lasts, self._waiting)):
            _point(self.layers[name], store.written(name) or {})
            del self._waiting[name]
        for name in list(self._unwritten):
            tensors = store.written(name)
            if tensors is None:
                break
            _point(self.layers[name], tensors)
            del self._unwritten[name]
            if not store.lasts(name):
                self._waiting[name] = None

    def _write(self, name: str) -> None:
        if self._store is not None:
            self._store.add(name, self.layers[name])
            if self._device.type == "cpu":
                self._unwritten[name] = None


def _point(layer: QuantLinear, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        setattr(layer, key, value)


def _move(tensors: dict[str, Tensor], device: torch.device, done: torch.cuda.Event | None) -> dict[str, Tensor]:
    """Copies the tensors on the worker's thread, which alone waits, and on a separate stream, so that no work waits.

    Args:
        tensors: The layer's.
        device: The model's.
        done: Marks the point of the GPU's work at which they are complete; None on a CPU.
    """
    if done is None:
        return {key: value.to(device) for key, value in tensors.items()}
    source = next(iter(tensors.values())).device
    with torch.cuda.stream(torch.cuda.Stream(source)):
        done.wait(torch.cuda.current_stream(source))
        return {key: value.to(device) for key, value in tensors.items()}
