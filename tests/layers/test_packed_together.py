"""Layers packed together are those that are packed one by one."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.gptq.grid import QuantizedWeight
from gptq_plugin.gptq.solve_each import Solutions
from gptq_plugin.layers import packed_together
from gptq_plugin.layers.packed_together import dequantize, dequantized_layers, packed_layers
from gptq_plugin.layers.qlinear import QuantLinear


def solutions(experts, n_in, rows, groups, bits):
    generator = torch.Generator().manual_seed(rows)

    def codes(*shape):
        return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)

    g_idx = torch.stack([torch.randperm(n_in, generator=generator).int() % groups for _ in range(experts)])
    scales = torch.rand(experts, groups, rows, generator=generator).half()
    zeros = codes(experts, groups, rows)
    empty = torch.empty(0)
    return Solutions(codes(experts, n_in, rows), scales, zeros, g_idx, empty, empty)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [slice(0, 7), slice(7, 20)])
def test_layers_packed_together_have_the_buffers_of_layers_packed_alone(bits, rows):
    solved = solutions(3, 40, 20, 2, bits)
    found = packed_layers(solved, rows, bits, 20, [torch.bfloat16, torch.float32, torch.bfloat16])
    for number, layer in enumerate(found):
        weight = QuantizedWeight(
            solved.codes[number].T, solved.scales[number], solved.zeros[number], solved.g_idx[number], bits, 20
        ).rows(rows.start, rows.stop)
        wanted = QuantLinear.from_quantized(weight, None, layer.weight.dtype)
        assert layer.weight.dtype == (torch.float32 if number == 1 else torch.bfloat16)
        assert layer.extra_repr() == wanted.extra_repr()
        for (name, buffer), (also, other) in zip(layer.named_buffers(), wanted.named_buffers(), strict=True):
            assert name == also and torch.equal(buffer, other) and buffer.is_contiguous()
            assert buffer.untyped_storage().nbytes() == buffer.nbytes  # its own
        whole = torch.full((2, 20, 40), torch.nan, dtype=torch.bfloat16)
        dequantize(solved, whole)
        assert number == 2 or torch.equal(whole[number, rows], layer.dequantize(torch.bfloat16))


def test_fewer_layers_than_matrices_are_the_first_ones():
    solved = solutions(4, 32, 8, 1, 4)
    assert len(packed_layers(solved, slice(0, 8), 4, 32, [torch.float32] * 3)) == 3


@pytest.mark.parametrize("together", [1, 1500, 2**25])
def test_layers_dequantized_together_have_the_values_of_layers_dequantized_alone(together, monkeypatch):
    monkeypatch.setattr(packed_together, "_TOGETHER", together)
    layers = [
        layer
        for bits, rows, experts in ((4, 20, 3), (3, 20, 2), (4, 12, 1), (2, 33, 5))
        for layer in packed_layers(
            solutions(experts, 40, rows, 2, bits), slice(0, rows), bits, 20, [torch.half] * experts
        )
    ]
    layers = layers[::2] + layers[1::2]
    dtypes = [(torch.bfloat16, torch.float32)[number % 3 > 0] for number in range(len(layers))]
    found = dequantized_layers(layers, dtypes, torch.device("cpu"))
    assert len(found) == len(layers) == 11
    for layer, dtype, values in zip(layers, dtypes, found, strict=True):
        alone = layer.dequantize(dtype)
        assert values.dtype == dtype and torch.equal(values, alone) and values.stride() == alone.stride()
