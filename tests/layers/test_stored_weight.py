"""A layer whose tensors are in the layout of the GPU's kernels, which is made and read back without a GPU."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from random_weights import random_weight
from torch import nn

from gptq_plugin.layers import kernel_layout
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import PACKED, arrange_layers

SHAPES = [
    {"bits": 4, "n_in": 256, "group_size": 128},
    {"bits": 3, "n_in": 96, "n_out": 40, "group_size": 32},
    {"bits": 2, "n_in": 128, "n_out": 33, "group_size": -1},
    {"bits": 8, "n_in": 100, "n_out": 37, "group_size": 64},
    {"bits": 4, "n_in": 256, "group_size": 32, "act_order": True},
]


@pytest.fixture(autouse=True)
def _every_device_is_served(monkeypatch):
    monkeypatch.setattr(kernel_layout, "is_served", lambda device: True)
    monkeypatch.setattr("gptq_plugin.layers.stored_weight.is_served", lambda device: True)


def make(bias=True, **shape):
    weight = random_weight(**shape)
    return QuantLinear.from_quantized(weight, torch.randn(len(weight.codes)) if bias else None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_copy_is_in_memory_and_state_dicts_have_a_checkpoints_bytes(shape):
    layer = make(**shape)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    size = sum(buffer.nbytes for buffer in layer.buffers())
    assert layer.arrange()
    held = {name for name, _ in layer.named_buffers()}
    assert {"words", "group_scales", "g_idx", "bias"} <= held and not held & {"qweight", "qzeros", "scales"}
    padded = 64 * 1024 * 5 // 8 + 2 * size  # of shapes as small as these
    assert sum(buffer.nbytes for buffer in layer.buffers()) < padded
    after = layer.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert layer.arranged() is not None, "a state dict leaves the layer as it is"
    for other in (copy.deepcopy(layer), torch.load(_saved(layer), weights_only=False)):
        assert other.arranged() is not None
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    for name in PACKED:
        assert torch.equal(getattr(layer, name), before[name])
    assert layer.arranged() is None and "words" not in dict(layer.named_buffers())


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def test_what_is_loaded_set_written_or_moved_is_what_the_layer_holds():
    layer, other = make(**SHAPES[0]), make(**SHAPES[0])
    layer.arrange()
    layer.load_state_dict(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())
    layer.arrange()
    layer.scales = layer.scales * 2
    assert layer.arranged() is None and torch.equal(layer.scales, other.scales * 2)
    layer.arrange()
    layer.scales.zero_()
    assert not layer.dequantize().any()
    layer.arrange()
    layer.to(torch.float64)
    assert layer.arranged() is None and layer.bias.dtype == torch.float64 and layer.scales.dtype == torch.float16


def test_tensors_that_somebody_puts_in_place_are_computed_with():
    layer, x = make(**SHAPES[0]), torch.randn(3, 256)
    other = {name: value for name, value in make(**SHAPES[0]).state_dict().items() if name != "qzeros"}
    layer.arrange()
    expected = layer.packed()._asdict() | other
    y = torch.func.functional_call(layer, other, (x,))
    plain = make(**SHAPES[0])
    plain.load_state_dict(expected)
    assert torch.equal(y, plain(x))


@pytest.mark.parametrize("why", ["group size", "g_idx", "bits behind the last code", "groups without channels"])
def test_what_the_layout_cannot_give_back_stays_as_it_is(why):
    layer = make(**(SHAPES[3] if why == "bits behind the last code" else SHAPES[4]))
    if why == "group size":
        layer = make(n_in=96, group_size=48)
    elif why == "g_idx":
        layer.g_idx[:] = layer.g_idx.roll(1).clamp(max=6)
    elif why == "groups without channels":
        layer.g_idx.zero_()
    else:
        layer.qzeros[:, -1] |= 1 << 30
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert not layer.arrange() and layer.arranged() is None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_model_is_arranged_layer_by_layer_and_exports_as_it_was():
    model = nn.Sequential(make(**SHAPES[0]), nn.Linear(48, 96), make(n_in=96, group_size=48))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arrange_layers(model)
    assert model[0].arranged() is not None and model[2].arranged() is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_threads_that_read_and_arrange_a_layer_see_one_weight():
    layer, failed = make(**SHAPES[0]), []
    expected = layer.dequantize()

    def run(call):
        try:
            for _ in range(30):
                call()
        except BaseException as error:
            failed.append(error)

    def read():
        assert torch.equal(layer.dequantize(), expected) and layer.qweight.shape == (32, 48)

    threads = [threading.Thread(target=run, args=(call,)) for call in (layer.arrange, layer.restore, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
