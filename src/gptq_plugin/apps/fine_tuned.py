"""Applies a fine-tune to its base model: the weights of a checkpoint, a PEFT adapter, or both."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from gptq_plugin.apps.lightning_weights import load_lightning_weights, open_lightning_weights
from gptq_plugin.apps.paths import folder_or_id, typed
from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.model.adapters import import_peft, merged_copy


def fine_tuned(network: nn.Module, *, ckpt: str | Path | None = None, adapter: str | Path | None = None) -> nn.Module:
    """Returns the fine-tuned model without adapters: `network` with new weights, or a copy with the adapter merged.

    Args:
        network: The base model.
        ckpt: A Lightning checkpoint whose weights replace the network's: a file, or the folder of a sharded one.
        adapter: A folder (or hub id) with a PEFT adapter, trained on the weights of `ckpt`. If `ckpt` was written with
            adapters in the model, it holds their weights too, and only adapter_config.json is read from the folder.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        CheckpointError: The checkpoint or the adapter does not belong to the network, or the checkpoint needs an
            adapter's configuration.
        ImportError: An adapter is given and peft is not installed.
        TargetError: The adapter cannot be merged.
    """
    weights = None if ckpt is None else open_lightning_weights(typed(ckpt))
    adapter = None if adapter is None else folder_or_id(adapter)
    if weights is not None and weights.adapted:
        if adapter is None:
            raise CheckpointError(
                f"{weights.path} was written with PEFT adapters in the model ({weights.adapted[0]}), and does not hold "
                "their scaling. Give adapter=FOLDER with their adapter_config.json too: the folder that "
                "model.save_pretrained wrote in training, or a new one from LoraConfig(...).save_pretrained(FOLDER) "
                "with the values of the run"
            )
        adapted = _add_adapter(network, adapter)
        load_lightning_weights(adapted.get_base_model(), weights)
        return merged_copy(adapted)
    if weights is not None:
        load_lightning_weights(network, weights)
    return network if adapter is None else merged_copy(_load_adapter(network, adapter))


def _add_adapter(network: nn.Module, adapter: str | Path) -> Any:
    """Adds adapters of this configuration, with initial values."""
    peft = import_peft()
    with _adapter_errors(adapter):
        return peft.get_peft_model(network, peft.PeftConfig.from_pretrained(str(adapter)))


def _load_adapter(network: nn.Module, adapter: str | Path) -> Any:
    peft = import_peft()
    with _adapter_errors(adapter):
        # Load on the network's device; by default PEFT goes through the GPU.
        return peft.PeftModel.from_pretrained(network, str(adapter), torch_device="cpu")


@contextlib.contextmanager
def _adapter_errors(adapter: str | Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            yield
        except (ValueError, RuntimeError, KeyError, OSError, UserWarning) as error:
            raise CheckpointError(f"adapter={adapter} cannot be put on the model: {brief(error)}") from error
