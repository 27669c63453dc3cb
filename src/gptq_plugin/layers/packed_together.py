"""Quantized layers of one shape, packed together: `packed_layers`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptq_plugin.layers.packing import pack
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import PACKED

if TYPE_CHECKING:
    from gptq_plugin.gptq.solve_each import Solutions


def packed_layers(
    solved: Solutions, rows: slice, bits: int, group_size: int, dtypes: Sequence[torch.dtype]
) -> list[QuantLinear]:
    """What `QuantLinear.from_quantized` makes of some rows of each of B matrices, without a bias.

    Args:
        solved: The matrices.
        rows: Of each.
        bits: Width of a code.
        group_size: As configured.
        dtypes: Of the float layers.
    """
    codes, scales, zeros = (part[..., rows] for part in (solved.codes, solved.scales, solved.zeros))
    batch, n_in, n_out = codes.shape
    words = pack(codes.movedim(0, 1).reshape(n_in, batch * n_out), bits).unflatten(1, (batch, n_out)).movedim(1, 0)
    of_zeros = pack(zeros.movedim(2, 0).reshape(n_out, -1), bits).unflatten(1, (batch, -1)).movedim(0, 2)
    layers = []
    parts = [_each_own(part) for part in (words, of_zeros, scales, solved.g_idx)]
    for dtype, *tensors in zip(dtypes, *parts, strict=False):  # the last matrices may fill a chunk
        layer = _like(_empty(n_in, n_out, bits, group_size, dtype))
        layer._buffers.update(zip(PACKED, tensors, strict=True))
        layers.append(layer)
    return layers


def dequantized(solved: Solutions, dtype: torch.dtype) -> Tensor:
    """All matrices, [B, rows, in], each value computed in float32 and rounded once."""
    group = solved.g_idx.long()[:, :, None]
    values = solved.codes.float()
    values -= solved.zeros.float().take_along_dim(group, 1)
    values *= solved.scales.float().take_along_dim(group, 1)
    return values.to(dtype).mT.contiguous()


def _each_own(tensors: Tensor) -> Sequence[Tensor]:
    """Copies of [B, ...] that share no memory with each other: whoever keeps one of them keeps no others."""
    copies: Sequence[Tensor] = torch.unbind_copy(tensors.contiguous())  # type: ignore[func-returns-value, assignment]
    return copies


@functools.lru_cache(maxsize=64)
def _empty(n_in: int, n_out: int, bits: int, group_size: int, dtype: torch.dtype) -> QuantLinear:
    """A layer on the meta device, of which others are made; its constructor takes longer than a chunk of them."""
    return QuantLinear(n_in, n_out, bits, group_size, dtype=dtype, device="meta")


def _like(layer: QuantLinear) -> QuantLinear:
    """Another layer, with the same buffers until it gets its own; the constructor takes ten times as long."""
    other = QuantLinear.__new__(QuantLinear)
    copies = {key: one.copy() if isinstance(one, (dict, set)) else one for key, one in vars(layer).items()}
    vars(other).update(copies)
    return other
