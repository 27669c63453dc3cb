"""The grids that weights are rounded to."""

from __future__ import annotations

import torch

from gptq_plugin.gptq.grid import round_to_nearest

from plain_gptq import correlated, plain


def test_round_to_nearest_takes_the_nearest_point_of_the_grid():
    weight, _ = correlated(rows=8, n=64)
    quantized = round_to_nearest(weight, plain(bits=4, group_size=16))
    half = quantized.scales.double()[quantized.g_idx.long()].T / 2
    error = (weight - quantized.dequantize(torch.float64)).abs()
    assert bool((error <= half * 1.01).all())


def test_asymmetric_zeros_stay_above_zero_in_the_v1_format():
    weight = correlated(rows=8, n=64)[0].abs()  # all positive: the natural zero is 0
    for checkpoint_format, least in (("gptq", 1), ("gptq_v2", 0)):
        config = plain(bits=4, group_size=32, sym=False, checkpoint_format=checkpoint_format)
        quantized = round_to_nearest(weight, config)
        assert int(quantized.zeros.min()) == least
        span = (quantized.dequantize(torch.float64) - weight).abs().max() / quantized.scales.max()
        assert span <= 0.51
