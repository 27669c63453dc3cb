"""The weights of a Lightning checkpoint, into the network they belong to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gptq_plugin.errors import CheckpointError


def load_lightning_weights(network: nn.Module, checkpoint: str | Path) -> None:
    """Loads the part of the checkpoint's state dict that is `network`, wherever the LightningModule held it.

    Args:
        network: The model, of the shapes that were trained.
        checkpoint: A ``.ckpt`` file; read without running code from it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is no Lightning checkpoint, or holds other weights than the network's.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own kinds
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} has no state_dict: it is no Lightning checkpoint")
    prefix = _prefix(network, state, path)
    network.load_state_dict({key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})


def _prefix(network: nn.Module, state: dict[str, torch.Tensor], path: Path) -> str:
    """What the LightningModule put before the network's own names, such as ``model.``."""
    wanted = network.state_dict()
    first = next(iter(wanted))
    candidates = [key[: -len(first)] for key in state if key == first or key.endswith(f".{first}")]
    for prefix in candidates:
        if all(prefix + key in state and state[prefix + key].shape == value.shape for key, value in wanted.items()):
            return prefix
    raise CheckpointError(
        f"{path} does not hold the weights of {type(network).__name__}: of its {len(wanted)} tensors, such "
        f"as {first} {tuple(wanted[first].shape)}, some are missing or have other shapes. Is "
        "model.name_or_path the model that was fine-tuned?"
    )
