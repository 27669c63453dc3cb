"""Weights of the float model a checkpoint was made from, read one at a time: `FloatWeights`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.checkpoint.shards import Shards
from gptq_plugin.errors import CheckpointError, brief


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
        folder = local_folder(name, token=token)
        try:
            self._shards = Shards.open(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} of the float model cannot be read: {brief(error)}") from error
        # Conv1D's weight is transposed and has the name of Linear's: the first matrix that is not square tells which.
        self._transposed = False

    def tensor(self, wanted: str) -> Tensor | None:
        """The tensor of that name, or None.

        A base model's names lack the prefix (``model.``) of classes with a head, or the other way round. A name that
        fits several tensors gives None.
        """
        names = [wanted] if wanted in self._shards.entries else []
        names = names or [
            name for name in self._shards.entries if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")
        ]
        return self._shards.read(names[0]) if len(names) == 1 else None

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
