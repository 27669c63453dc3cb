"""The product of quantized layers on a CPU as one of bytes."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest
import torch
from random_weights import Weight, random_weight
from table_products import check_products, formula

from gptq_plugin.layers import cpu_product, int8_cpu
from gptq_plugin.layers.code_table import CodeTable
from gptq_plugin.layers.int8_cpu import Int8
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.weight_table import WeightTable

from forked_python import python

pytestmark = pytest.mark.skipif(not int8_cpu.is_served(), reason="needs a CPU with AVX-512 VNNI")

SHAPES = [
    {"group_size": 64},
    {"n_in": 300, "n_out": 45, "group_size": 100, "act_order": True},
    {"n_in": 67, "n_out": 37, "group_size": 67},
    {"n_in": 1000, "n_out": 9, "group_size": -1},
    {"n_in": 210, "n_out": 1, "group_size": 70},
]


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    monkeypatch.setattr(int8_cpu, "_FEWEST", 1)
    torch.manual_seed(0)


def symmetric(weight: Weight) -> Weight:
    return replace(weight, zeros=torch.full_like(weight.zeros, 2 ** (weight.bits - 1)))


def repacked(weight: Weight) -> Int8 | None:
    layer = QuantLinear.from_quantized(weight)
    return Int8.repack(layer.packed(), weight.bits, layer.channels_per_group())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_accurate_as_a_float_layers(shape, bits, monkeypatch):
    monkeypatch.setattr(int8_cpu, "_SUMS", 16)
    weight = random_weight(bits=bits, **shape)
    product = repacked(symmetric(weight) if bits == 8 else weight)
    w = formula(symmetric(weight) if bits == 8 else weight)
    for rows in (1, 5, 35):
        check_products(product, w, rows, of_bfloat16=4e-3)


def test_rows_of_any_size_keep_their_digits():
    weight = random_weight(n_in=192, n_out=40, group_size=64)
    product, w = repacked(weight), formula(weight)
    x = torch.randn(7, 192)
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3] = 0
    x[4, 5] = 1e4
    x[5] *= 1e-37
    x[6, ::2] = x[6].abs().max()
    y, expected = product.matmul(x).double(), x.double() @ w.t()
    assert bool(((y - expected).norm(dim=1) <= 2e-7 * expected.norm(dim=1)).all())
    ignored = w.clone()
    ignored[:, 5] = 0  # what is left beside a number 10,000 times as large
    rest = product.matmul(x[4:5]).double() - x[4, 5].double() * w[:, 5]
    assert float((rest - x[4:5].double() @ ignored.t()).norm()) <= 2e-7 * float(expected[4].norm())


@pytest.mark.parametrize(
    "shape",
    [
        {"group_size": 32},
        {"n_in": 100, "group_size": 64},
        {"bits": 8, "group_size": 128},  # codes less their zeros have nine bits
    ],
    ids=str,
)
def test_other_layers_are_not_taken(shape):
    assert repacked(random_weight(**shape)) is None
    weight = random_weight(group_size=64)
    mixed = weight.g_idx.clone()
    mixed[0] = 1
    assert repacked(replace(weight, g_idx=mixed)) is None, "groups of other sizes"


def test_only_layers_of_some_size_are_taken(monkeypatch):
    monkeypatch.setattr(int8_cpu, "_FEWEST", 128 * 48)
    assert repacked(random_weight(group_size=64)) is not None
    assert repacked(random_weight(n_out=47, group_size=64)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_layer_uses_it_for_many_finite_rows(dtype, monkeypatch):
    weight = random_weight(group_size=64)
    layer = QuantLinear.from_quantized(weight)
    taken = []
    for kind in (CodeTable, WeightTable, Int8):
        own = kind.matmul
        monkeypatch.setattr(kind, "matmul", lambda *args, kind=kind, own=own: taken.append(kind) or own(*args))
    few = max(1, cpu_product._ROWS_BEFORE_INT8 // torch.get_num_threads())
    x = torch.randn(9, 128, dtype=dtype)
    for rows, kind in ((1, CodeTable), (few, CodeTable), (few + 1, Int8), (9, Int8)):
        y = layer(x[:rows])
        assert y.dtype == dtype and taken.pop() is kind
        expected = x[:rows].double() @ formula(weight).t()
        assert float((y.double() - expected).norm() / expected.norm()) < 1e-3
    layer(x.repeat(4, 1).bfloat16())
    layer(x[:1].repeat(cpu_product._MOST_ROWS_OF_INT8, 1))
    layer(x[:1].repeat(cpu_product._MOST_ROWS_OF_INT8 + 1, 1))
    assert taken == [WeightTable, Int8, WeightTable]


def test_infinite_numbers_and_nan_are_a_float_layers():
    weight = random_weight(group_size=64)
    layer, w = QuantLinear.from_quantized(weight), formula(weight).float()
    x = torch.randn(40, 128)
    x[3, 7], x[4, 7], x[5, 9] = torch.inf, -torch.inf, torch.nan
    y, expected = layer(x), x @ w.t()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("context", [torch.inference_mode(), torch.autocast("cpu", torch.float16)], ids=type)
def test_defaults_and_modes_of_callers_make_no_difference(context):
    layer, x = QuantLinear.from_quantized(random_weight(group_size=64)), torch.randn(9, 128).half()
    expected = layer(x)
    assert layer._prepared.cpu.int8 is not None
    layer._prepared = None
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with context:
            assert torch.equal(layer(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(layer(x), expected)


def test_without_such_instructions_tables_serve(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    weight = random_weight(group_size=64)
    layer = QuantLinear.from_quantized(weight)
    x = torch.randn(40, 128)
    expected = x.double() @ formula(weight).t()
    assert float((layer(x).double() - expected).norm() / expected.norm()) < 1e-6
    assert layer._prepared.cpu.int8 is None


def test_without_their_use_tables_serve():
    """A user may restrict oneDNN to instructions whose sums have 16 bits."""
    code = "from gptq_plugin.layers import int8_cpu; print(int8_cpu.is_served())"
    for isa, served in (("AVX512_CORE", "False"), ("DEFAULT", "True")):
        env = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
        run = subprocess.run([python(), "-c", code], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == served
