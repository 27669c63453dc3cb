"""Writes a model's float tensors and config.json: transformers' way, or for a plain module in a minimal one."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.checkpoint.files import CONFIG, write_json
from gptq_plugin.errors import ExportError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import TENSORS
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.model.hf_models import is_encoder_decoder, published_class, tied_weights

log = logging.getLogger(__name__)

MAX_SHARD = "5GB"  # of a transformers model's float tensors


def float_state(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """The entries of the state dict that belong to no quantized layer."""
    quantized = {f"{name}.{suffix}" for name in layers for suffix in TENSORS}
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in quantized}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"{name} is a {type(value).__name__}: safetensors holds tensors only; remove the extra state"
            )
    return state


def write_transformers(staging: Path, model: Any, floats: dict[str, Tensor], description: dict[str, Any]) -> list[Path]:
    """Writes everything `save_pretrained` does; returns its safetensors files. Their index, if any, is not final."""
    if has_adapters(model):
        raise ExportError("the model carries PEFT adapters: quantize and export gptq_plugin.merged_copy(model) instead")
    original = model.config
    model.config = copy.deepcopy(original)  # save_pretrained writes dtype and architectures into it
    try:
        detached = _apart({name: tensor.detach() for name, tensor in floats.items()}, tied_weights(model))
        try:
            model.save_pretrained(staging, state_dict=detached, max_shard_size=MAX_SHARD)
        except ValueError as error:  # transformers would join weights of which some are quantized now
            log.warning(
                "the float weights keep the model's own names, since published names join them with weights that are "
                "quantized now (%s): other clients may not find them",
                error,
            )
            model.save_pretrained(staging, state_dict=detached, max_shard_size=MAX_SHARD, save_original_format=False)
    finally:
        model.config = original
    config = json.loads((staging / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = description
    if not getattr(original, "auto_map", None):  # models that bring their own code name their class themselves
        config["architectures"] = [(published_class(model) or type(model)).__name__]
    if not _is_tied(model):
        for part in (config, config.get("text_config") or {}):
            if "tie_word_embeddings" in part or part is config:
                part["tie_word_embeddings"] = False
    write_json(staging / CONFIG, config)
    return sorted(staging.glob("model*.safetensors"))


def _apart(state: dict[str, Tensor], tied: Container[str]) -> dict[str, Tensor]:
    """The state with a copy of every tensor that shares memory with an earlier one, but for those that the model's
    class ties: transformers leaves these out, and refuses others."""
    seen: set[int] = set()
    found = dict(state)
    for name, tensor in state.items():
        if name in tied or tensor.device.type == "meta" or not tensor.numel():
            continue
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen:
            found[name] = tensor.clone()
        seen.add(memory)
    return found


def _is_tied(model: Any) -> bool:
    """False if the output embedding does not have the weight that the configuration lets it share.

    It may be quantized, or trained apart. transformers then loads both weights, other clients only the shared one. An
    encoder-decoder keeps the flag: T5 scales its outputs by it.
    """
    head = model.get_output_embeddings()
    if isinstance(head, QuantLinear):
        return False
    name = next((name for name, module in model.named_modules() if module is head), None)
    source = tied_weights(model).get(f"{name}.weight")
    if head is None or source is None or is_encoder_decoder(model):
        return True
    shared = model.get_parameter(source)
    return head.weight is shared or torch.equal(head.weight.to(shared.device), shared)


def write_plain_config(staging: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Writes config.json of a plain module: its class and the description."""
    kind = type(model)
    write_json(
        staging / CONFIG,
        {"module_class": f"{kind.__module__}.{kind.__qualname__}", "quantization_config": description},
    )


def once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lists every tensor once, tied ones under their first name, each in memory of its own size."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    tensors: dict[str, Tensor] = {}
    for name in first.values():
        value = state[name].detach()
        part_of_more = value.untyped_storage().nbytes() != value.numel() * value.element_size()
        tensors[name] = value.clone() if part_of_more else value
    return tensors
