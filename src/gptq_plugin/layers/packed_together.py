"""Quantized layers of one shape, packed and dequantized together: `packed_layers`, `dequantize`."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptq_plugin.kernels.reference import expand
from gptq_plugin.layers.packing import pack
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import PACKED

if TYPE_CHECKING:
    from gptq_plugin.gptq.solve_each import Solutions

_TOGETHER = 2**25  # weights that are dequantized at a time, which takes 16 bytes for each


def packed_layers(
    solved: Solutions, rows: slice, bits: int, group_size: int, dtypes: Sequence[torch.dtype]
) -> list[QuantLinear]:
    """What `QuantLinear.from_quantized` makes of some rows of each of B matrices, without a bias.

    No layer shares memory with another: accelerate would save the first of them alone.

    Args:
        solved: The matrices.
        rows: Of each.
        bits: Width of a code.
        group_size: As configured.
        dtypes: Of the float layers.
    """
    every = slice(0, len(dtypes))  # the last matrices may fill a chunk
    codes, scales, zeros = (part[every, :, rows] for part in (solved.codes, solved.scales, solved.zeros))
    batch, n_in, n_out = codes.shape
    words = pack(codes.movedim(0, 1).reshape(n_in, batch * n_out), bits).unflatten(1, (batch, n_out)).movedim(1, 0)
    of_zeros = pack(zeros.movedim(2, 0).reshape(n_out, -1), bits).unflatten(1, (batch, -1)).movedim(0, 2)
    layers = []
    parts = [_apart(part) for part in (words, of_zeros, scales, solved.g_idx[every])]
    for dtype, *tensors in zip(dtypes, *parts, strict=True):
        layer = empty_layer(n_in, n_out, bits, group_size, dtype)
        layer._buffers.update(zip(PACKED, tensors, strict=True))
        layers.append(layer)
    return layers


def _apart(values: Tensor) -> list[Tensor]:
    """The parts of a tensor along its first dimension, each in memory of its own, copied in a few launches for all."""
    parts = values.contiguous().unbind()
    copies = [torch.empty_like(part) for part in parts]
    torch._foreach_copy_(copies, parts)
    return copies


def dequantize(solved: Solutions, out: Tensor) -> None:
    """Writes the first matrices to `out`, [B, rows, in], each value computed in float32 and rounded once.

    Args:
        solved: At least B matrices.
        out: Contiguous; float16, bfloat16, float32 or float64.
    """
    every = slice(len(out))
    parts = solved.codes[every], solved.zeros[every], solved.scales[every], solved.g_idx[every]
    if out.is_cuda and out.dtype != torch.float64:
        from gptq_plugin.kernels.values import values_of  # imported here: needs Triton

        values_of(*parts, out)
    else:
        out.copy_(_values(*parts, out.dtype))


def dequantized_layers(
    layers: Sequence[QuantLinear], dtypes: Sequence[torch.dtype], device: torch.device
) -> list[Tensor]:
    """What `dequantize` gives of each layer on a device, while the layers stay where they are.

    Layers of one shape are computed together, since a launch for each takes longer than hundreds of experts' values;
    theirs are views of one tensor.

    Args:
        layers: Any layers.
        dtypes: Of the values of each.
        device: Where to compute.
    """
    found: list[Tensor] = [torch.empty(0, device="cpu")] * len(layers)
    alike: dict[Any, list[int]] = defaultdict(list)
    packed = [layer.packed() for layer in layers]
    for number, (layer, tensors, dtype) in enumerate(zip(layers, packed, dtypes, strict=True)):
        alike[layer.bits, dtype, tuple(tensor.shape for tensor in tensors)].append(number)
    for (bits, dtype, _), numbers in alike.items():
        first = layers[numbers[0]]
        size = max(1, _TOGETHER // (first.in_features * first.out_features))
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            if len(some) == 1:  # in the kernel's tiles, a large layer may have little room beside it
                found[some[0]] = _on_device(layers[some[0]], device).dequantize(dtype)
                continue
            there = [[tensor.to(device) for tensor in packed[number]] for number in some]
            for number, values in zip(some, _dequantized(there, bits, dtype), strict=True):
                found[number] = values
    return found


def _on_device(layer: QuantLinear, device: torch.device) -> QuantLinear:
    """The layer, or a copy elsewhere."""
    if layer.device == device:
        return layer
    sizes = layer.in_features, layer.out_features, layer.bits, layer.group_size
    other = empty_layer(*sizes, torch.float32)  # its bias is not needed
    other._buffers.update(zip(PACKED, (tensor.to(device) for tensor in layer.packed()), strict=True))
    return other


def _dequantized(packed: Sequence[Sequence[Tensor]], bits: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """Values of layers of one shape by their tensors, in the order of `PACKED`."""
    words, zeros, scales, g_idx = (torch.stack(of_all) for of_all in zip(*packed, strict=True))
    (batch, _, n_out), n_in = words.shape, g_idx.shape[1]
    codes = expand(words.movedim(1, 0).flatten(1), bits, n_in).unflatten(1, (batch, n_out)).movedim(1, 0)
    of_zeros = expand(zeros.movedim(2, 0).flatten(1), bits, n_out).unflatten(1, (batch, -1)).movedim(0, 2)
    return _values(codes, of_zeros, scales, g_idx, dtype).unbind()


def _values(codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, dtype: torch.dtype) -> Tensor:
    """Of B matrices, [B, rows, in], as views in the order in which `dequantize` has them.

    The arguments are as in `Solutions`, codes and zeros of any integer dtype.
    """
    group = g_idx.long()[:, :, None]
    values = codes.to(torch.float32, memory_format=torch.contiguous_format)
    values -= zeros.float().take_along_dim(group, 1)
    values *= scales.float().take_along_dim(group, 1)
    return values.to(dtype).mT


def empty_layer(
    n_in: int, n_out: int, bits: int, group_size: int, dtype: torch.dtype, *, bias: bool = False
) -> QuantLinear:
    """A layer on the meta device; the constructor, which has the same arguments, takes ten times as long.

    Its buffers are those of others too: to be replaced, not written to.
    """
    layer, other = _constructed(n_in, n_out, bits, group_size, dtype, bias), QuantLinear.__new__(QuantLinear)
    copies = {key: one.copy() if isinstance(one, (dict, set)) else one for key, one in vars(layer).items()}
    vars(other).update(copies)
    return other


@functools.lru_cache(maxsize=64)
def _constructed(n_in: int, n_out: int, bits: int, group_size: int, dtype: torch.dtype, bias: bool) -> QuantLinear:
    return QuantLinear(n_in, n_out, bits, group_size, bias=bias, dtype=dtype, device="meta")
