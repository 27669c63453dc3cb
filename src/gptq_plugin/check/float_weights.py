"""The float model a checkpoint was made from, one weight at a time: `FloatWeights`. Never the whole model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_plugin.checkpoint.files import INDEX
from gptq_plugin.errors import CheckpointError


class FloatWeights:
    """The weights in a folder of safetensors files, sharded or not.

    Args:
        directory: As `save_pretrained` writes it.

    Raises:
        CheckpointError: No safetensors file, or one that cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        files = self._files()
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} of the float model cannot be read: {error}") from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))
        # transformers' families call Conv1D's transposed weight and Linear's alike: a matrix that is not square tells.
        self._transposed = False

    def tensor(self, wanted: str) -> Tensor | None:
        """The tensor of that name; None where there is none.

        A base model's names lack the prefix that its other classes have (``model.``), or the other way round.
        """
        names = [name for name in self._handles if name == wanted]
        names = names or [name for name in self._handles if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
        return self._handles[names[0]].get_tensor(names[0]) if len(names) == 1 else None

    def weight(self, layer: str, shape: tuple[int, int]) -> Tensor | None:
        """The weight of the layer of that name, [out, in] = `shape`; None where there is none such."""
        tensor = self.tensor(f"{layer}.weight")
        if tensor is None:
            return None
        if tensor.shape == shape[::-1] and shape[0] != shape[1]:
            self._transposed = True
        if self._transposed:
            tensor = tensor.T
        return tensor if tensor.shape == shape else None

    def _files(self) -> list[Path]:
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a folder: give the folder of the float model")
        index = self.directory / INDEX
        if index.is_file():
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [self.directory / name for name in named]
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self.directory} holds no safetensors file: save the float model with save_pretrained there"
            )
        return files
