"""Reads the weights of a Lightning checkpoint into the network they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.apps.sharded_weights import INDEX, read_sharded, sharded_tensors
from gptq_plugin.errors import CheckpointError, brief, some
from gptq_plugin.lightning.checkpoint_file import read_checkpoint

# Parts of the names that PEFT gives to what it wraps.
_ADAPTED = (".base_layer.", ".modules_to_save.", ".token_adapter.")


@dataclass(frozen=True)
class LightningWeights:
    """An open checkpoint, whose weights have not been read yet.

    Attributes:
        path: The file or folder.
        shapes: Shape by name of its tensors.
        read: Fills the given tensors, by name.
    """

    path: Path
    shapes: Mapping[str, torch.Size]
    read: Callable[[dict[str, Tensor]], None]

    @property
    def adapted(self) -> list[str]:
        """Names of tensors that come from a model with PEFT adapters."""
        return [key for key in self.shapes if any(part in key for part in _ADAPTED)]


def open_lightning_weights(checkpoint: str | Path) -> LightningWeights:
    """Opens a checkpoint without running code from it.

    Args:
        checkpoint: A ``.ckpt`` file, or the folder of a sharded checkpoint (FSDPStrategy with
            ``state_dict_type="sharded"``, ModelParallelStrategy), written by any number of processes.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        CheckpointError: It is not a Lightning checkpoint.
    """
    path = Path(checkpoint).expanduser()
    if os.path.isdir(path):
        return _open_folder(path)
    state = read_checkpoint(path)["state_dict"]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def read(wanted: dict[str, Tensor]) -> None:
        layouts = {key: "meta" if tensors[key].is_meta else tensors[key].layout for key in wanted}
        _refuse_other_kinds(path, wanted, {key: (layouts[key], tensors[key].dtype) for key in wanted})
        for key, tensor in wanted.items():
            tensor.copy_(tensors[key])

    return LightningWeights(path, {key: tensor.shape for key, tensor in tensors.items()}, read)


def load_lightning_weights(network: nn.Module, weights: LightningWeights) -> None:
    """Reads the network's weights from the checkpoint, under whichever name the LightningModule held the network.

    Raises:
        CheckpointError: The checkpoint lacks some of them, or holds more.
    """
    wanted = network.state_dict()
    prefix = _prefix(network, wanted, weights)
    weights.read({prefix + key: tensor for key, tensor in wanted.items()})


def _open_folder(path: Path) -> LightningWeights:
    if not (path / INDEX).is_file():
        files = sorted(one.name for one in path.glob("*.ckpt"))
        hint = f". Give one of the checkpoints in it: {some(files)}" if files else ""
        raise CheckpointError(f"{path} is a folder without {INDEX}: it is not a sharded checkpoint{hint}")
    try:
        stored = sharded_tensors(path)
        shapes = {key: torch.Size(entry.size) for key, entry in stored.items()}
        kinds = {key: (entry.properties.layout, entry.properties.dtype) for key, entry in stored.items()}
    except Exception as error:  # a broken pickle may raise anything
        raise CheckpointError(f"{path} cannot be read as a sharded checkpoint: {brief(error)}") from error

    def read(wanted: dict[str, Tensor]) -> None:
        _refuse_other_kinds(path, wanted, kinds)
        try:
            read_sharded(path, wanted)
        except Exception as error:  # a shard that is cut off or missing, each in its own way
            raise CheckpointError(f"{path} cannot be read as a sharded checkpoint: {brief(repr(error))}") from error

    return LightningWeights(path, shapes, read)


def _refuse_other_kinds(path: Path, wanted: Mapping[str, Tensor], kinds: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuses tensors whose values are no weights.

    Args:
        path: The checkpoint.
        wanted: The network's, by name.
        kinds: Layout (or "meta") and dtype of those in the checkpoint.

    Raises:
        CheckpointError: Some are not dense, or are not floating-point where the network's are, or the other way round.
    """
    wrong = [
        f"{key} ({layout}, {dtype})"
        for key, tensor in wanted.items()
        for layout, dtype in [kinds[key]]
        if layout is not torch.strided
        or not isinstance(dtype, torch.dtype)
        or dtype.is_floating_point != tensor.is_floating_point()
        or (dtype.is_floating_point and dtype.itemsize == 1)  # float8, whose scales lie elsewhere
    ]
    if wrong:
        raise CheckpointError(
            f"{path} holds {some(wrong)}, which are not the values of such weights: only dense tensors are read, "
            "floating-point ones of 16 bits or more for floating-point weights"
        )


def _prefix(network: nn.Module, wanted: Mapping[str, Tensor], weights: LightningWeights) -> str:
    """The prefix of the network's names in the checkpoint, such as ``model.``."""
    shapes = weights.shapes
    first = next(iter(wanted))
    candidates = [key[: -len(first)] for key in shapes if key == first or key.endswith(f".{first}")]
    for prefix in candidates:
        if all(shapes.get(prefix + key) == value.shape for key, value in wanted.items()):
            unread = [key for key in shapes if key.startswith(prefix) and key[len(prefix) :] not in wanted]
            if unread:
                raise CheckpointError(
                    f"{weights.path} holds more than the weights of {type(network).__name__}: {some(unread)}. Is "
                    "model.name_or_path the model that was fine-tuned, and were there other adapters?"
                )
            return prefix
    raise CheckpointError(
        f"{weights.path} does not hold the weights of {type(network).__name__}: of its {len(wanted)} tensors, such "
        f"as {first} {tuple(wanted[first].shape)}, some are missing or have other shapes. Is "
        "model.name_or_path the model that was fine-tuned?"
    )
