"""Which products of a model are measured: each size of layer once for each GPU, in the dtype it computes in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gptq_plugin.kernels.product import autotune as product_autotune
from gptq_plugin.kernels.product import tuned
from random_weights import random_weight
from torch import nn

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.layers import autotune as module
from gptq_plugin.layers import kernel_layout, stored_weight
from gptq_plugin.layers.autotune import autotune
from gptq_plugin.layers.qlinear import QuantLinear

from kernel_cases import gpu
from paths import FIXTURES


@pytest.fixture
def calls(monkeypatch):
    """Every device is served; what would be measured is noted."""
    for place in (kernel_layout, stored_weight, module):
        monkeypatch.setattr(place, "is_served", lambda device: True)
    found = []
    monkeypatch.setattr(
        product_autotune, "autotune", lambda wanted, device, **options: found.append((list(wanted), device, options))
    )
    return found


def make(dtype=torch.float16, **shape):
    return QuantLinear.from_quantized(random_weight(**shape), dtype=dtype)


def test_each_size_is_measured_once_in_its_dtype_and_layers_are_in_the_kernels_layout(calls):
    model = nn.ModuleList(
        [make(n_in=256, n_out=64, group_size=128), make(n_in=256, n_out=64, group_size=128), nn.Linear(3, 3),
         make(torch.bfloat16, n_in=256, n_out=64, group_size=128), make(n_in=96, group_size=48),
         make(torch.float64, n_in=256, n_out=64, group_size=128), make(n_in=256, n_out=33, group_size=32)]
    )  # fmt: skip
    autotune(model, always=True, folder="somewhere")
    ((wanted, device, options),) = calls
    assert device == torch.device("cpu") and options == {"always": True, "folder": "somewhere"}
    sizes = [(layout.n_in, layout.n_out, layout.group, dtype) for layout, dtype in wanted]
    half, bfloat = torch.float16, torch.bfloat16
    assert sizes == [(256, 64, 128, half), (256, 64, 128, bfloat), (256, 33, 32, half)]
    assert model[0].arranged() is not None and model[4].arranged() is None


def test_without_triton_loading_goes_on(calls, monkeypatch, caplog):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    autotune(make(n_in=256, n_out=64, group_size=128))
    assert calls == [] and "without Triton" in caplog.text


def test_a_model_that_is_not_on_a_gpu_is_left_alone(monkeypatch):
    monkeypatch.setattr(product_autotune, "autotune", lambda *rest, **options: pytest.fail("measured"))
    layer = make(n_in=256, n_out=64, group_size=128)
    autotune(layer)
    assert layer.arranged() is None


LLAMA = next(path for path in sorted(FIXTURES.iterdir()) if path.name.startswith("gptqmodel"))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"always": False, "folder": None}),
        ({"autotune": True, "autotune_dir": Path("x")}, {"always": True, "folder": Path("x")}),
        ({"autotune": False}, None),
    ],
)
def test_loading_measures_as_it_is_told(calls, given, options):
    model = load_quantized(LLAMA, **given)
    assert [call[2] for call in calls] == ([] if options is None else [options])
    for wanted, _, _ in calls:
        layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
        assert {layout for layout, _ in wanted} == {layer.arranged().layout for layer in layers if layer.arranged()}
        assert {dtype for _, dtype in wanted} == {model.dtype}


def test_quantizing_and_training_on_never_measures(calls, tmp_path):
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64))
    data = [torch.randn(16, 256) for _ in range(4)]
    quantizer = QuantizeModule(bits=4, group_size=64)
    quantizer.quantize(model, data)
    model(data[0])
    assert calls == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"autotune": 1}, "autotune must be one of True, False, or None"),
        ({"autotune": "yes"}, "autotune must be"),
        ({"autotune_dir": 5}, "autotune_dir must be a path, or None"),
        ({"autotune_dir": ""}, "autotune_dir must be"),
    ],
)
def test_an_option_of_another_type_is_refused_before_anything_is_read(given, message):
    with pytest.raises(ValueError, match=message):
        load_quantized("no/such/folder/at/all", **given)


@gpu
def test_on_a_gpu_a_checkpoint_loads_measured_and_the_next_load_reads_it(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(product_autotune, "SMALL", 0)
    monkeypatch.setattr(tuned, "_of_process", {})
    expected = load_quantized(LLAMA, device="cuda", autotune=False)
    models = [load_quantized(LLAMA, device="cuda", autotune=True, autotune_dir=tmp_path)]
    tuned._of_process.clear()
    models.append(load_quantized(LLAMA, device="cuda", autotune=True, autotune_dir=tmp_path))
    assert len(list(tmp_path.glob("*.json"))) == 1 and "products measured in" in caplog.text
    known = [int(number) for number in re.findall(r"products to be measured, (\d+) in", caplog.text)]
    assert len(known) == 2 and known[0] == 0 < known[1]
    ids = torch.arange(1, 40, device="cuda")[None]
    first, second, plain = (model(ids).logits for model in (*models, expected))
    assert max((first - plain).abs().max(), (second - plain).abs().max()) < 0.15
    assert "kernels=(1 row: " in repr(models[0])
