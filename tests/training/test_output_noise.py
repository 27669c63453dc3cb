"""The noise of quantized layers' outputs, by which escalation ranks them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule, distributed
from gptq_plugin.training.output_noise import output_noise


def test_the_noise_of_a_layer_is_that_of_its_output_on_what_it_reads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    floats = {"0": model[0], "2": model[2]}
    x = torch.randn(3, 64), torch.randn(5, 64)
    QuantizeModule(bits=2, group_size=32).round_to_nearest(model)
    noise = output_noise(model, floats, [lambda: model(x[0]), lambda: model(input=x[1])])
    read = {"0": torch.cat(x), "2": model[1](model[0](torch.cat(x)))}
    for name, layer in floats.items():
        wanted = layer(read[name])
        assert noise[name] == pytest.approx(float((model[int(name)](read[name]) - wanted).square().sum() /
                                                  wanted.square().sum()), rel=1e-4)  # fmt: skip
    assert not any(module._forward_hooks for module in model.modules())
    assert output_noise(model, floats, []) == {"0": 0.0, "2": 0.0}


def test_the_noise_is_that_of_all_ranks_inputs(monkeypatch):
    """Ranks add up errors and outputs: the mean of their quotients would be another number."""
    floats = {"0": nn.Linear(4, 2, bias=False)}
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    model[0].weight.data = 1.5 * floats["0"].weight.data
    x = torch.ones(1, 4)
    whole = float(floats["0"](x).square().sum())
    monkeypatch.setattr(
        distributed, "gather_objects", lambda mine: [mine, ({"0": [whole, 2 * whole]}, {"0": [9 * whole]})]
    )
    assert math.isclose(output_noise(model, floats, [lambda: model(x)])["0"], (0.25 + 3) / (1 + 9), rel_tol=1e-5)


def test_no_hook_is_left_when_a_batch_fails():
    model = nn.Sequential(nn.Linear(4, 2))

    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        output_noise(model, {"0": nn.Linear(4, 2)}, [fail])
    assert not model[0]._forward_hooks
