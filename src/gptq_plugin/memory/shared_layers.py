"""Finished layers in files that all ranks of a node map, so that the node holds them once: `SharedLayers`."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_plugin.errors import ExportError
from gptq_plugin.layers.qlinear import QuantLinear


class SharedLayers:
    """The layers of one quantization in one folder, a file each. Every rank adds the same layers in the same order.

    Args:
        folder: Seen by all ranks of a node; must not exist, and is made by the rank that writes.
        writes: True on the rank that writes the files.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self._folder = folder
        self._writes = writes
        self._files: dict[str, Path] = {}
        if writes:
            folder.mkdir()

    def add(self, name: str, layer: QuantLinear) -> None:
        """Takes a finished layer on the CPU, and writes it if this rank does.

        Raises:
            ExportError: The file cannot be written.
        """
        self._files[name] = file = self._folder / f"{len(self._files)}.safetensors"
        if not self._writes:
            return
        partial = file.with_suffix(".partial")
        try:
            save_file({key: tensor.contiguous() for key, tensor in layer.named_buffers()}, partial)
            os.replace(partial, file)  # so no rank maps half a file
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"{name} could not be written to {partial}: {error}. Make room there, or choose another export_dir"
            ) from error

    def written(self, name: str) -> dict[str, Tensor] | None:
        """The layer's buffers, mapped; None until the file is there. They stay valid when it is removed."""
        file = self._files[name]
        if not file.exists():
            return None
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (the handle cannot be iterated)

    def lasts(self, name: str) -> bool:
        return True
