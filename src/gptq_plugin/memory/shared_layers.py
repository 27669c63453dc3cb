"""Finished layers in files that all ranks of a node map, so that none holds them for itself: `SharedLayers`."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_plugin.errors import ExportError
from gptq_plugin.layers.qlinear import QuantLinear


class SharedLayers:
    """One quantization's layers in one folder, a file each. Every rank adds the same layers in the same order.

    Args:
        folder: All ranks of a node see it; made here.
        writes: Whether it is this rank that writes there.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self._folder = folder
        self._writes = writes
        self._files: dict[str, Path] = {}
        if writes:
            folder.mkdir()

    def add(self, name: str, layer: QuantLinear) -> None:
        """Takes a finished layer on the CPU.

        Raises:
            ExportError: It cannot be written.
        """
        self._files[name] = file = self._folder / f"{len(self._files)}.safetensors"
        if not self._writes:
            return
        partial = file.with_suffix(".partial")
        try:
            save_file({key: tensor.contiguous() for key, tensor in layer.named_buffers()}, partial)
            os.replace(partial, file)  # nobody sees half of it
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"{name} could not be written to {partial}: {error}. Make room there, or choose another export_dir"
            ) from error

    def written(self, name: str) -> dict[str, Tensor] | None:
        """The layer's buffers, mapped, or None while the file is not there. They outlive it."""
        file = self._files[name]
        if not file.exists():
            return None
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (the handle is no mapping)
