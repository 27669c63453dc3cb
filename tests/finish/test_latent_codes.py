"""Layers whose codes are trained: the layer's weight at the start, a checkpoint's integers at the end."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.finish.latent_codes import LatentCodes
from gptq_plugin.layers.packing import unpack_weight

from random_layers import CASES, CPU, layer_of


def nearby(layer, size=2.0):
    """A float weight some steps from the layer's."""
    scales = layer.scales.float().t()[:, layer.g_idx.long()]
    generator = torch.Generator().manual_seed(7)
    return layer.dequantize() + (torch.rand(scales.shape, generator=generator) * 2 - 1) * size * scales


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("wanted", [True, False])
def test_it_begins_at_the_weight_of_the_layer_bit_for_bit_whatever_is_wanted(case, wanted):
    layer = layer_of(*case)
    latent = LatentCodes(layer, CPU)
    if wanted:
        latent.begin_at(nearby(layer))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(latent.dequantize(dtype), layer.dequantize(dtype))
    assert torch.equal(latent.packed_codes(), layer.qweight) and torch.equal(latent.rounded_scales(), layer.scales)
    assert bool(latent.latent.frac().any()) == wanted


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_begins_at_what_is_wanted_where_that_is_rounded_to_the_layers_codes(case):
    layer = layer_of(*case)
    wanted = nearby(layer, 0.45)
    latent = LatentCodes(layer, CPU)
    latent.begin_at(wanted)
    torch.testing.assert_close(latent.wanted(), wanted, rtol=1e-4, atol=1e-5)


def test_a_scale_of_zero_begins_at_its_codes():
    layer = layer_of(4, 32, 96, None)
    layer.scales[1] = 0
    latent = LatentCodes(layer, CPU)
    latent.begin_at(torch.randn(24, 96))
    assert torch.isfinite(latent.latent).all() and torch.equal(latent.packed_codes(), layer.qweight)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_after_steps_it_is_the_weight_of_the_layer_with_its_codes_and_scales_bit_for_bit(case):
    layer = layer_of(*case)
    latent = LatentCodes(layer, CPU)
    before = layer.dequantize()
    with torch.no_grad():
        latent.latent += torch.randn(latent.latent.shape) * 3
        latent.log_ratio += torch.randn_like(latent.log_ratio) * 0.1
    layer.qweight, layer.scales = latent.packed_codes(), latent.rounded_scales()
    assert not torch.equal(layer.dequantize(), before)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(latent.dequantize(dtype), layer.dequantize(dtype))
    assert int(unpack_weight(layer.qweight, layer.bits, layer.in_features).max()) < 2**layer.bits
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(latent(x), x @ layer.dequantize().t() + layer.bias)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_pass_the_rounding_and_stop_where_they_lead_beyond_the_grid(case):
    layer = layer_of(*case)
    latent = LatentCodes(layer, CPU)
    with torch.no_grad():
        latent.latent += torch.randn(latent.latent.shape) * 2
    groups = layer.g_idx.long()
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, 5, layer.out_features, dtype=torch.float64)
    found = torch.autograd.grad((latent(x) * direction).sum(), [x, latent.log_ratio, latent.latent])

    scales = layer.scales.double().t()[:, groups]
    low, high = latent.low.double()[:, groups], latent.high.double()[:, groups]
    raw = latent.latent.detach().double()
    codes = torch.minimum(torch.maximum(raw.round(), low), high)
    of_weight = torch.einsum("abo,abi->oi", direction, x.detach())
    of_latent = of_weight * scales
    of_latent[(raw > high) & (of_latent < 0) | (raw < low) & (of_latent > 0)] = 0
    of_ratio = torch.zeros_like(latent.log_ratio, dtype=torch.float64).index_add_(1, groups, of_weight * codes * scales)
    for one, wanted in zip(found, (direction @ (codes * scales), of_ratio, of_latent), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-4)
    assert bool((found[2] == 0).any()) and bool((raw > high).any())


def test_it_reads_as_a_linear_layer_does_and_computes_under_autocast():
    layer = layer_of(3, 32, 96, None, bias=False)
    latent = LatentCodes(layer, CPU)
    assert latent.weight.shape == (24, 96) and latent.weight.isnan().all()
    with torch.autocast("cpu", torch.bfloat16):
        y = latent(torch.randn(2, 96))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.isfinite(latent.latent.grad).all()
