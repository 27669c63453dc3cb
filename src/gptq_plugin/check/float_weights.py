"""Weights of the float model a checkpoint was made from, read one at a time: `FloatWeights`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_plugin.checkpoint.files import INDEX
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.errors import CheckpointError


class FloatWeights:
    """The weights in a folder of safetensors files, sharded or not.

    Args:
        name: The folder, as `save_pretrained` writes it, or the id of a repository on the hub.
        token: For a private or gated repository.

    Raises:
        CheckpointError: No such folder or repository, no safetensors file, or one that cannot be read.
    """

    def __init__(self, name: str | Path, token: str | bool | None = None) -> None:
        self.name = str(name)
        files = _files(local_folder(name, token=token))
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} of the float model cannot be read: {error}") from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))
        # Conv1D's weight is transposed and has the name of Linear's: the first matrix that is not square tells which.
        self._transposed = False

    def tensor(self, wanted: str) -> Tensor | None:
        """The tensor of that name, or None.

        A base model's names lack the prefix (``model.``) of classes with a head, or the other way round. A name that
        fits several tensors gives None.
        """
        names = [name for name in self._handles if name == wanted]
        names = names or [name for name in self._handles if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
        return self._handles[names[0]].get_tensor(names[0]) if len(names) == 1 else None

    def weight(self, layer: str, shape: tuple[int, int]) -> Tensor | None:
        """The weight of the layer of that name, [out, in] = `shape`, or None."""
        tensor = self.tensor(f"{layer}.weight")
        if tensor is None:
            return None
        if tensor.shape == shape[::-1] and shape[0] != shape[1]:
            self._transposed = True
        if self._transposed:
            tensor = tensor.T
        return tensor if tensor.shape == shape else None


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in named]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file: save the float model with save_pretrained there")
    return files
