"""Quantized layers with random tensors, of every kind that differs."""

from __future__ import annotations

import torch

from gptq_plugin.gptq.grid import QuantizedWeight
from gptq_plugin.layers.qlinear import QuantLinear

CPU = torch.device("cpu")
CASES = {
    "4 bits": (4, 32, 96, None),
    "3 bits, zeros of their own": (3, 32, 96, "zeros"),
    "2 bits, act-order": (2, 32, 96, "order"),
    "8 bits": (8, 32, 64, None),
    "8 bits, zeros of their own": (8, 16, 64, "zeros"),
    "one group": (4, -1, 60, None),
    "a last group that is smaller": (4, 32, 80, "zeros"),
}


def layer_of(bits, group_size, channels, kind, outputs=24, bias=True):
    generator = torch.Generator().manual_seed(bits)
    size = channels if group_size == -1 else group_size
    groups = -(-channels // size)
    g_idx = torch.arange(channels, dtype=torch.int32) // size
    if kind == "order":
        g_idx = g_idx[torch.randperm(channels, generator=generator)]
    zeros = torch.full((groups, outputs), 2 ** (bits - 1), dtype=torch.uint8)
    if kind == "zeros":
        zeros = torch.randint(0, 2**bits, (groups, outputs), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(
        codes=torch.randint(0, 2**bits, (outputs, channels), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(groups, outputs, generator=generator) * 0.1 + 1e-3).half(),
        zeros=zeros,
        g_idx=g_idx,
        bits=bits,
        group_size=group_size,
    )
    return QuantLinear.from_quantized(weight, torch.randn(outputs, generator=generator) if bias else None)
