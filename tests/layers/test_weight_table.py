"""The product of quantized layers on a CPU from weights that operators of embeddings unpack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_weights import Weight, random_weight
from table_products import check_products, formula
from torch import Tensor

from gptq_plugin.layers import weight_table
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.weight_table import WeightTable

SHAPES = [
    {},
    {"n_out": 45},
    {"n_in": 75, "n_out": 37, "group_size": 15},
    {"n_in": 100},
    {"act_order": True},
    {"n_in": 300, "n_out": 9, "group_size": -1},
    {"n_in": 600, "n_out": 300, "group_size": 200, "act_order": True},
    {"n_in": 1, "n_out": 1, "group_size": 1},
]


def table_of(weight: Weight) -> WeightTable:
    return WeightTable.of(QuantLinear.from_quantized(weight).packed(), weight.bits)


def weights_of(table: WeightTable, dtype: torch.dtype, tiles: int = 1) -> Tensor:
    """[out, in], channels as x has them."""
    w = torch.cat([panel.clone() for panel in table.weights(dtype, tiles)])
    if table.channels is None:
        return w
    out = torch.full((len(w), table.n_in + 1), torch.nan, dtype=dtype)
    return out.index_copy_(1, table.channels, w)[:, :-1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_exact_and_products_as_accurate_as_a_float_layers(shape, bits, symmetric, monkeypatch):
    monkeypatch.setattr(weight_table, "_TILE", 2**11)
    monkeypatch.setattr(weight_table, "_OUTPUTS", 4)
    monkeypatch.setattr(weight_table, "_MANY_ROWS", 130)
    weight = random_weight(bits=bits, **shape)
    if symmetric:
        weight = replace(weight, zeros=torch.full_like(weight.zeros, 2 ** (bits - 1)))
    table, w = table_of(weight), formula(weight)
    assert table.offsets is None or (not symmetric and bits != 8)
    for dtype in (torch.float32, torch.bfloat16):
        for tiles in (1, 3):
            assert torch.equal(weights_of(table, dtype, tiles), w.to(dtype))
    for rows in (2, 130):
        check_products(table, w, rows, of_bfloat16=8e-3)


@pytest.mark.parametrize("n_in, tiles", [(64, [256, 44]), (80, [192, 108]), (320, [64, 64, 64, 64, 44])])
def test_weights_are_unpacked_by_whole_blocks_of_outputs(n_in, tiles, monkeypatch):
    monkeypatch.setattr(weight_table, "_TILE", 2**14)
    table = table_of(random_weight(bits=4, n_in=n_in, n_out=300, group_size=16))
    assert [len(weights) for weights in table.weights(torch.float32, 1)] == tiles


@pytest.mark.parametrize("scale", [0.01, 9000.0, 60000.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_whose_offsets_overflow_in_float16_are_exact_too(scale, bits):
    weight = random_weight(bits=bits)
    weight.scales[1, 3] = scale
    assert torch.equal(weights_of(table_of(weight), torch.float32), formula(weight).float())


def test_groups_of_any_channels_and_none_are_served():
    weight = random_weight()
    weight = replace(weight, g_idx=torch.tensor([0, 2, 3, 3], dtype=torch.int32).repeat(32))
    assert torch.equal(weights_of(table_of(weight), torch.float32), formula(weight).float())


def test_a_group_of_one_channel_beside_long_ones_costs_little_memory():
    weight = random_weight(n_in=1024, n_out=64, group_size=128)
    g_idx = weight.g_idx.clone()
    g_idx[g_idx == 7] = 6
    g_idx[5] = 7
    table = table_of(replace(weight, g_idx=g_idx))
    assert torch.equal(weights_of(table, torch.float32), formula(replace(weight, g_idx=g_idx)).float())
    assert table.rows.numel() < 1.3 * 64 * 1024 / 2


def test_what_is_0_in_all_of_a_group_is_0_whatever_its_scale():
    weight = random_weight(bits=4)
    weight.codes[5] = weight.zeros[:, 5].repeat_interleave(32)
    weight.scales[:, 5] = 1000
    assert not table_of(weight).matmul(torch.randn(20, 128))[:, 5].any()
