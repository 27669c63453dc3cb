"""Describes a checkpoint's files, and finds where they contradict each other or clients' expectations."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import torch

from gptq_plugin.check.findings import Finding, error, warning
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.files import CONFIG, GENERATION_CONFIG, QUANTIZE_CONFIG, read_json
from gptq_plugin.checkpoint.layer_checks import damage_of
from gptq_plugin.checkpoint.many_modules import refuse_many_modules
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.errors import CheckpointError, some
from gptq_plugin.options.fields import shown

_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")


def facts(checkpoint: Checkpoint, inventory: Inventory) -> dict[str, str]:
    """Properties of the checkpoint, by heading."""
    grids = Counter((x.bits, x.group_size, x.sym, x.act_order) for x in inventory.layers)
    described = [
        f"{count} layer{'s' * (count != 1)} at {bits} bits, group_size={size}, {'symmetric' if sym else 'asymmetric'}"
        + (", act-order" if ordered else "")
        for (bits, size, sym, ordered), count in grids.most_common()
    ]
    sizes = {name: _bytes(entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
    total, float_bytes = sum(sizes.values()), sum(sizes[name] for name in checkpoint.float_names)
    architecture = (checkpoint.model_config.get("architectures") or [None])[0]
    lacks_tokenizer = str(architecture).endswith("ForCausalLM") and not any(
        (checkpoint.directory / name).is_file() for name in _TOKENIZER
    )
    return {
        "format": checkpoint.checkpoint_format,
        "model": str(architecture or checkpoint.model_config.get("module_class") or "unknown"),
        **({"tokenizer": "none in the folder: servers need one"} if lacks_tokenizer else {}),
        "layers": "; ".join(described),
        "left float": some(inventory.floats) if inventory.floats else "no linear layer inside the blocks",
        "bytes": f"{total:,}, of which {float_bytes / total:.0%} are float weights in {short(inventory.dtype)}",
    }


def file_findings(checkpoint: Checkpoint, inventory: Inventory) -> Iterator[Finding]:
    """Faults that show without looking at a quantized weight."""
    return chain(
        _contradictions(checkpoint),
        _unusable(checkpoint),
        _tied_head(checkpoint, inventory),
        _scales_dtype(checkpoint),
        _no_g_idx(checkpoint),
        _not_finite(checkpoint),
    )


def short(dtype: torch.dtype) -> str:
    """``"float16"`` of torch.float16."""
    return str(dtype).removeprefix("torch.")


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    digits = re.sub(r"\D.*", "", dtype.lstrip("BFIUOL")) or "8"  # safetensors' names: F16, BF16, I64, F8_E4M3, BOOL
    return math.prod(shape) * int(digits) // 8


def _contradictions(checkpoint: Checkpoint) -> Iterator[Finding]:
    inside, beside = checkpoint.quantization, checkpoint.quantize_config
    for key in checkpoint.format.repeated:
        if key in inside and key in beside and inside[key] != beside[key]:
            yield error(
                f"{CONFIG} has {key}={shown(inside[key])} and {QUANTIZE_CONFIG} has {shown(beside[key])}: clients read "
                "one or the other, so correct the wrong one"
            )


def _unusable(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What `load_quantized` would refuse of the files that describe the model."""
    generation = checkpoint.directory / GENERATION_CONFIG
    try:
        refuse_many_modules(checkpoint.model_config, checkpoint.directory / CONFIG, checkpoint.tensors.values())
        if os.path.lexists(generation):
            read_json(generation)
    except CheckpointError as refusal:
        yield error(str(refusal))


def _tied_head(checkpoint: Checkpoint, inventory: Inventory) -> Iterator[Finding]:
    parts = (checkpoint.model_config, checkpoint.model_config.get("text_config") or {})
    if inventory.lm_head and any(part.get("tie_word_embeddings") for part in parts):
        yield error(
            "the output embedding is quantized and config.json ties it to the float input embedding, which loaders "
            "then take instead: set tie_word_embeddings to false"
        )


def _scales_dtype(checkpoint: Checkpoint) -> Iterator[Finding]:
    if not checkpoint.format.float16_scales:
        return
    kinds = Counter(checkpoint.tensors[f"{name}.{checkpoint.format.scales}"].dtype for name in checkpoint.layers)
    if kinds["BF16"]:
        yield warning(
            f"the scales of {kinds['BF16']} layers are bfloat16: if they were rounded from float16, weights moved "
            "by up to 0.4 % (compare with the float model to see); float16 is what GPTQ clients expect"
        )
    if kinds["F32"]:
        yield warning(
            f"the scales of {kinds['F32']} layers are float32 and hold float16 values: no number changes, but GPTQ "
            "clients expect float16"
        )


def _not_finite(checkpoint: Checkpoint) -> Iterator[Finding]:
    wrong = [name for name in checkpoint.float_names if damage_of(name, checkpoint.read(name))]
    if wrong:
        yield error(f"{some(wrong)}: not quantized, and NaN or infinity are in it: the file is damaged")


def _no_g_idx(checkpoint: Checkpoint) -> Iterator[Finding]:
    without = [name for name, layer in checkpoint.layers.items() if not layer.has_g_idx]
    if without and checkpoint.format.always_g_idx:
        yield warning(
            f"{some(without)} have no g_idx: no number changes, since desc_act=false means i // group_size; "
            "transformers reports missing keys"
        )
