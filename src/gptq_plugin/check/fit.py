"""Compares a checkpoint with the model that its config.json describes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gptq_plugin.check.findings import Finding, warning
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.load import architecture_of
from gptq_plugin.checkpoint.reserve import refuse_missing, reserve
from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.model.hf_models import without_weights
from gptq_plugin.model.stored_names import key_renaming


def misfits(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Builds the model without weights, and compares names of tensors and sizes of layers, as `load_quantized` does.

    A plain module is not built, and a class in the folder's code is not run.
    """
    if not checkpoint.model_config.get("architectures"):
        return
    try:
        model = _made(*architecture_of(checkpoint, False))
        rename = key_renaming(model)
        floats = {key for name in checkpoint.float_names for key in (name, *rename(name))}
        reserve(checkpoint, model)
        refuse_missing(checkpoint, model, floats)
    except CheckpointError as refusal:
        if not checkpoint.model_config.get("auto_map"):
            yield warning(f"load_quantized refuses it: {refusal}")


def _made(architecture: Any, config: Any) -> Any:
    """The model, on the meta device.

    Raises:
        CheckpointError: There is none of that configuration.
    """
    try:
        return without_weights(architecture, config)
    except Exception as error:  # whatever values that nobody expected lead to
        raise CheckpointError(
            f"transformers cannot build {architecture.__name__} ({type(error).__name__}: {brief(error)})"
        ) from error
