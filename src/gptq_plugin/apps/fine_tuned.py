"""A base model with what a fine-tune made of it: the weights of a checkpoint, a PEFT adapter, or both."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from gptq_plugin.apps.lightning_weights import load_lightning_weights, open_lightning_weights
from gptq_plugin.errors import CheckpointError
from gptq_plugin.model.adapters import import_peft, merged_copy


def fine_tuned(network: nn.Module, *, ckpt: str | Path | None = None, adapter: str | Path | None = None) -> nn.Module:
    """The fine-tuned model, without adapters: `network` itself with new weights, or a copy with the adapter merged.

    Args:
        network: The base model.
        ckpt: A Lightning checkpoint whose weights replace the network's: a file, or the folder of a sharded one.
        adapter: A folder (or hub id) with a PEFT adapter. Of a checkpoint that was written with adapters in the model
            only its adapter_config.json is read; the weights are the checkpoint's. Of any other checkpoint the adapter
            is taken as trained on it.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: The checkpoint or the adapter does not belong to the network, or the checkpoint needs an
            adapter's configuration.
        ImportError: An adapter is given and peft is not installed.
        TargetError: The adapter cannot be merged.
    """
    weights = None if ckpt is None else open_lightning_weights(ckpt)
    if weights is not None and weights.adapted:
        if adapter is None:
            raise CheckpointError(
                f"{weights.path} was written with PEFT adapters in the model ({weights.adapted[0]}), and does not say "
                "how they were scaled. Give adapter=FOLDER with their adapter_config.json too: the folder that "
                "model.save_pretrained wrote in training, or a new one from LoraConfig(...).save_pretrained(FOLDER) "
                "with the values of the run"
            )
        adapted = _configured(network, adapter)
        load_lightning_weights(adapted.get_base_model(), weights)
        return merged_copy(adapted)
    if weights is not None:
        load_lightning_weights(network, weights)
    return network if adapter is None else merged_copy(_loaded(network, adapter))


def _configured(network: nn.Module, adapter: str | Path) -> Any:
    """The network with adapters as the configuration says, whose values come later."""
    peft = import_peft()
    with _its_errors(adapter):
        return peft.get_peft_model(network, peft.PeftConfig.from_pretrained(str(adapter)))


def _loaded(network: nn.Module, adapter: str | Path) -> Any:
    peft = import_peft()
    with _its_errors(adapter):
        # Where the network is: by itself PEFT would take the way over a GPU.
        return peft.PeftModel.from_pretrained(network, str(adapter), torch_device="cpu")


@contextlib.contextmanager
def _its_errors(adapter: str | Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            yield
        except (ValueError, RuntimeError, KeyError, OSError, UserWarning) as error:
            raise CheckpointError(f"adapter={adapter} cannot be put on the model: {error}") from error
