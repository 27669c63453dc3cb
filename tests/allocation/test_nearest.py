"""Nearest rounding of a weight, each group on the grid that suits it."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.allocation.nearest import _RATIOS, nearest
from gptq_plugin.gptq.grid import round_to_nearest


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3, "sym": False}, {"bits": 4, "group_size": -1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_best_of_all_ratios_for_every_group(options, dtype):
    config = QuantizeConfig(**{"group_size": 32, **options})
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded, error = nearest(weight, config)
    size = 96 if config.group_size == -1 else 32
    assert error.item() == pytest.approx((rounded - weight.float()).square().sum().item(), rel=1e-5)
    least = torch.full((7, 96 // size), torch.inf)
    for ratio in _RATIOS:
        low = weight.float().unflatten(1, (-1, size))
        ends = torch.stack([low.amin(-1), low.amax(-1)], -1) * ratio
        span = ends.abs().amax(-1) * 2 if config.sym else ends[..., 1].clamp(min=0) - ends[..., 0].clamp(max=0)
        scale = (span / (2**config.bits - 1)).half().float()[..., None]
        zero = 2 ** (config.bits - 1) if config.sym else (-ends[..., :1] / scale).round().clamp(1, 2**config.bits - 1)
        codes = (low / scale + zero).round().clamp(0, 2**config.bits - 1)
        least = torch.minimum(least, ((codes - zero) * scale - low).square().sum(-1))
    assert error.item() <= least.sum().item() * (1 + 1e-5)
    if config.sym:
        assert error.item() == pytest.approx(least.sum().item(), rel=1e-5)


def test_it_is_never_worse_than_the_whole_range():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) ** 3
    for bits in (2, 3, 4, 8):
        config = QuantizeConfig(bits=bits, group_size=32)
        plain = (round_to_nearest(weight, config).dequantize() - weight).square().sum()
        assert nearest(weight, config)[1] <= plain * (1 + 1e-6)


def test_zeros_stay_zeros():
    rounded, error = nearest(torch.zeros(4, 32), QuantizeConfig(group_size=32))
    assert error == 0 and not rounded.any()
