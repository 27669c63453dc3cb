"""Random quantized weights, as a solver returns them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """What a solver returns, by its fields."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    group_size: int


def random_weight(n_in=128, n_out=48, bits=4, group_size=32, act_order=False) -> Weight:
    channels = n_in if group_size == -1 else group_size
    groups = -(-n_in // channels)
    g_idx = torch.arange(n_in, dtype=torch.int32) // channels
    return Weight(
        codes=torch.randint(0, 2**bits, (n_out, n_in), dtype=torch.uint8),
        scales=(torch.rand(groups, n_out) + 0.1).half(),
        zeros=torch.randint(0, 2**bits, (groups, n_out), dtype=torch.uint8),
        g_idx=g_idx[torch.randperm(n_in)] if act_order else g_idx,
        bits=bits,
        group_size=group_size,
    )
