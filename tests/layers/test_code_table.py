"""The product of quantized layers on a CPU from tables of embeddings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_weights import Weight, random_weight
from table_products import check_products, formula

from gptq_plugin.layers.code_table import CodeTable
from gptq_plugin.layers.qlinear import QuantLinear

SHAPES = [
    {},
    {"n_out": 45},
    {"n_in": 75, "n_out": 37, "group_size": 15},
    {"n_in": 100},
    {"act_order": True},
    {"n_in": 300, "n_out": 9, "group_size": -1},
    {"n_in": 600, "n_out": 600, "group_size": 200, "act_order": True},
    {"n_in": 1, "n_out": 1, "group_size": 1},
    {"n_in": 1100, "n_out": 1031, "group_size": 128},
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def table_of(weight: Weight) -> CodeTable:
    return CodeTable.of(QuantLinear.from_quantized(weight).packed(), weight.bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_rows_have_the_accuracy_of_a_float_product(shape, bits, symmetric):
    weight = random_weight(bits=bits, **shape)
    if symmetric:
        weight = replace(weight, zeros=torch.full_like(weight.zeros, 2 ** (bits - 1)))
    table, w = table_of(weight), formula(weight)
    assert (table.offsets is None) or not symmetric
    for rows in (1, 6):
        check_products(table, w, rows, of_bfloat16=5e-3)


def test_a_group_of_zeros_gives_zero_whatever_its_scale():
    weight = random_weight(bits=4)
    weight.codes[5] = weight.zeros[:, 5].repeat_interleave(32)
    weight.scales[:, 5] = 1000
    assert not table_of(weight).matmul(torch.randn(1, 128))[:, 5].any()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    table, x = table_of(random_weight(n_out=600)), torch.randn(6, 128)
    assert torch.equal(table.matmul(x), torch.cat([table.matmul(row[None]) for row in x]))


def test_groups_of_any_channels_and_none_are_served():
    weight = random_weight()
    weight = replace(weight, g_idx=torch.tensor([0, 2, 3, 3], dtype=torch.int32).repeat(32))
    x = torch.randn(2, 128)
    expected = x.double() @ formula(weight).t()
    assert float((table_of(weight).matmul(x).double() - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("group", [-1, 4])
def test_a_group_that_does_not_exist_is_refused(group):
    layer = QuantLinear.from_quantized(random_weight())
    layer.g_idx[3] = group
    with pytest.raises(ValueError, match=r"g_idx must be in \[0, 4\)"):
        layer(torch.randn(2, 128))


def test_autocast_to_float16_does_not_reach_the_sums():
    layer = QuantLinear.from_quantized(random_weight(n_in=1024))
    x = torch.randn(20, 1024)
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    assert torch.equal(y, layer(x.half()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inputs_of_any_strides_are_served(dtype):
    layer = QuantLinear.from_quantized(random_weight(act_order=True), torch.randn(48))
    x = torch.randn(2, 128, 5).to(dtype).mT
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_a_long_group_is_added_in_parts():
    table, x = table_of(weight := random_weight(n_in=8192, n_out=64, group_size=-1)), torch.randn(1, 8192)
    expected = x.double() @ formula(weight).t()
    assert float((table.matmul(x).double() - expected).norm() / expected.norm()) < 8e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_is_noticed_also_where_none_is_counted(inference, dtype):
    with torch.inference_mode(inference):
        layer, x = QuantLinear.from_quantized(random_weight()), torch.randn(20, 128).to(dtype)
        before = layer(x)
        layer.scales.mul_(2)
        assert torch.equal(layer(x), before * 2)
