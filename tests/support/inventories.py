"""Inventories of checkpoints, for tests of what clients take."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from gptq_plugin.clients.inventory import Inventory, LayerEntry
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.plan import planned
from gptq_plugin.model.structure import Structure

SHAPES = {  # [in, out]
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (256, 128),
    "self_attn.v_proj": (256, 128),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (256, 1024),
    "mlp.up_proj": (256, 1024),
    "mlp.down_proj": (1024, 256),
}


def of_planned(model: nn.Module, config: QuantizeConfig) -> Inventory:
    """Of a float model that is to be quantized."""
    with planned(model, config) as plan:
        return Inventory.of_plan(plan)


def of_quantized(model: nn.Module, config: QuantizeConfig) -> Inventory:
    """Of a quantized model, without the report of its quantization."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return Inventory.of_layers(Structure.of_unfused(model), layers, config)


def inventory(
    *, change: dict[str, dict[str, Any]] | None = None, leave: tuple[str, ...] = (), **fields: Any
) -> Inventory:
    """A Llama's block at 4 bits, symmetric, groups of 128, in float16; `change` by layer ("" for all of them)."""
    of_layer = {name: fields.pop(name) for name in ("bits", "group_size", "sym", "act_order") if name in fields}
    layers = []
    for name, (inputs, outputs) in SHAPES.items():
        if name in leave:
            continue
        layer = LayerEntry(f"model.layers.0.{name}", 4, 128, inputs, outputs, True, False)
        layers.append(dataclasses.replace(layer, **of_layer, **(change or {}).get(name, {})))
    plain = Inventory(
        checkpoint_format="gptq",
        layers=tuple(layers),
        floats=tuple(f"model.layers.0.{name}" for name in leave),
        lm_head=False,
        desc_act=bool(of_layer.get("act_order")),
        rules={},
        dtype=torch.float16,
        model_type="llama",
    )
    return dataclasses.replace(plain, **fields)


Q4 = {"self_attn.q_proj": {"bits": 8}}
QKV8 = {f"self_attn.{x}_proj": {"bits": 8} for x in "qkv"}
DOWN8 = {"mlp.down_proj": {"bits": 8}}
CT = "compressed-tensors"
RANGES = {"model.layers.0.self_attn.q_proj": 65504.0, "model.layers.0.self_attn.v_proj": 66000.0}

EXPERTS = tuple(f"model.layers.0.mlp.experts.{e}.{x}_proj" for e in (0, 1) for x in ("gate", "up", "down"))
MIXTRAL = tuple(f"model.layers.0.mlp.experts.{e}.w{x}" for e in (0, 1) for x in (1, 2, 3))
FUSED = ("model.layers.0.mlp.experts.0.gate_up_proj", "model.layers.0.mlp.experts.0.down_proj")


def experts(
    names: tuple[str, ...] = EXPERTS, *, leave: tuple[str, ...] = (), change: dict[str, Any] | None = None, **own: Any
) -> dict[str, Any]:
    """A block of experts beside attention; `change` is of its last layer, `own` of all."""
    layers = [LayerEntry(name, **{**GRID, **own}) for name in (*names, "model.layers.0.self_attn.o_proj")]
    layers[-2] = dataclasses.replace(layers[-2], **(change or {}))
    return {"layers": tuple(x for x in layers if x.name not in leave), "floats": leave}


GRID = {"bits": 4, "group_size": 128, "in_features": 256, "out_features": 256, "sym": True, "act_order": False}


def half_llama(dtype: torch.dtype = torch.float16) -> Any:
    """Two blocks of odd sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()
