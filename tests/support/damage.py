"""Small checkpoints of every width, and ways to damage their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gptq_plugin.layers.packing import pack_zeros, unpack_zeros

LAYER = "model.layers.0.mlp.up_proj"
WIDTHS = {
    f"{bits} bits {'symmetric' if sym else 'asymmetric'}": {"bits": bits, "sym": sym}
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
}
OTHERS: dict[str, dict[str, Any]] = {
    "4 bits act-order": {"desc_act": True, "static_groups": False},
    "3 bits a row": {"bits": 3, "group_size": -1},
    "4 bits compressed-tensors": {"checkpoint_format": "compressed-tensors", "sym": False},
    "4 bits best": {"method": "best"},
    "4 bits natural order": {"static_groups": False, "clip_ratios": (1.0,)},
}


def quantizable_llama() -> Any:
    """One block, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


COMPRESSED = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}


def renamed(tensors: dict[str, torch.Tensor], suffixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """compressed-tensors' tensors under GPTQ's names, or the other way round: each is the other transposed."""
    result = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        new = suffixes.get(suffix)
        result[f"{module}.{new}" if new else name] = tensor.T.contiguous() if new else tensor.contiguous()
    return result


def zeros_off(tensors: dict[str, torch.Tensor], bits: int, by: int = 1, only: str = "") -> None:
    for name in [n for n in tensors if n.endswith(f"{only}.qzeros")]:
        outputs = tensors[name.replace("qzeros", "scales")].shape[1]
        tensors[name] = pack_zeros((unpack_zeros(tensors[name], bits, outputs) + by) & (2**bits - 1), bits)


def one_group_off(tensors: dict[str, torch.Tensor], bits: int) -> None:
    """The zeros of one group in four, in a single layer."""
    whole = dict(tensors)
    zeros_off(tensors, bits, only=LAYER)
    tensors[f"{LAYER}.qzeros"][1:] = whole[f"{LAYER}.qzeros"][1:]


def bytes_swapped(tensors: dict[str, torch.Tensor], bits: int) -> None:
    for name in [n for n in tensors if n.endswith("qweight")]:
        single = tensors[name].view(torch.uint8).reshape(-1, 4).flip(-1).contiguous()
        tensors[name] = single.view(torch.int32).reshape(tensors[name].shape)


def scaled(tensors: dict[str, torch.Tensor], bits: int, only: str = "", by: float = 1.05) -> None:
    for name in [n for n in tensors if n.endswith(f"{only}.scales")]:
        tensors[name] = (tensors[name].float() * by).half()


def rolled(tensors: dict[str, torch.Tensor], bits: int) -> None:
    name = "model.layers.0.mlp.down_proj.qweight"
    tensors[name] = tensors[name].roll(1, 0)


def reversed_groups(tensors: dict[str, torch.Tensor], bits: int) -> None:
    for name in [n for n in tensors if n.endswith("g_idx")]:
        tensors[name] = tensors[name].flip(0)


def one_channel_in_another_group(tensors: dict[str, torch.Tensor], bits: int) -> None:
    for name in [n for n in tensors if n.endswith("g_idx")]:
        tensors[name][0] = (tensors[name][0] + 1) % (int(tensors[name].max()) + 1)


def without(suffix: str, only: str = "") -> Callable[[dict[str, torch.Tensor], int], None]:
    def remove(tensors: dict[str, torch.Tensor], bits: int) -> None:
        for name in [n for n in tensors if n.endswith(f"{only}.{suffix}")]:
            del tensors[name]

    return remove


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor], int], None]:
    def change(tensors: dict[str, torch.Tensor], bits: int) -> None:
        for name in [n for n in tensors if n.endswith("scales")]:
            tensors[name] = tensors[name].to(dtype)

    return change
