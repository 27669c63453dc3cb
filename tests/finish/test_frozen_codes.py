"""Layers with frozen codes: the weight of the checkpoint, and gradients for its scales."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.finish.frozen_codes import FrozenCodes

from random_layers import CASES, CPU, layer_of


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_that_of_the_layer_bit_for_bit_before_and_after_scales_move(case, dtype):
    layer = layer_of(*case)
    frozen = FrozenCodes(layer, CPU)
    assert torch.equal(frozen.dequantize(dtype), layer.dequantize(dtype))
    assert torch.equal(frozen.rounded_scales(), layer.scales)
    with torch.no_grad():
        frozen.log_ratio += torch.randn_like(frozen.log_ratio) * 0.1
    layer.scales = frozen.rounded_scales()
    assert layer.scales.dtype == torch.float16 and not torch.equal(layer.scales.float().t(), frozen.start)
    assert torch.equal(frozen.dequantize(dtype), layer.dequantize(dtype))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_the_float_expression(case):
    layer = layer_of(*case)
    frozen = FrozenCodes(layer, CPU)
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    y = frozen(x)
    direction = torch.randn_like(y)
    of_x, of_ratio = torch.autograd.grad((y * direction).sum(), [x, frozen.log_ratio])

    ratio = torch.zeros_like(frozen.log_ratio, dtype=torch.float64, requires_grad=True)
    per_group = layer.dequantize(torch.float64) / layer.scales.double().t()[:, layer.g_idx.long()]
    scales = layer.scales.double().t() * ratio.exp()
    expected = x @ (per_group * scales[:, layer.g_idx.long()]).t() + layer.bias
    wanted = torch.autograd.grad((expected * direction).sum(), [x, ratio])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_x, wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_ratio.double(), wanted[1], rtol=1e-4, atol=1e-4)


def test_it_computes_under_autocast_and_reads_as_a_linear_layer_does():
    layer = layer_of(4, 32, 96, None, bias=False)
    frozen = FrozenCodes(layer, CPU)
    x = torch.randn(2, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.isfinite(frozen.log_ratio.grad).all()
    torch.testing.assert_close(y.float(), x @ layer.dequantize().t(), rtol=0.02, atol=0.05)
    assert frozen.weight.shape == (24, 96) and frozen.weight.dtype == layer.weight.dtype
    assert frozen.weight.isnan().all()


def test_the_layer_keeps_its_tensors():
    layer = layer_of(3, 32, 96, "zeros")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    frozen = FrozenCodes(layer, CPU)
    with torch.no_grad():
        frozen.log_ratio += 1
    frozen(torch.randn(2, 96)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
