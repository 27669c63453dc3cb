"""Which layers are fused: those that one forward calls with one tensor, and that agree."""

from __future__ import annotations

import copy

import pytest
import torch
from random_weights import random_weight
from torch import nn

from gptq_plugin.layers import fuse, kernel_layout
from gptq_plugin.layers.fuse import fuse_layers
from gptq_plugin.layers.qlinear import QuantLinear


@pytest.fixture(autouse=True)
def _every_device_is_served(monkeypatch):
    torch.manual_seed(0)
    for module in (kernel_layout, fuse):
        monkeypatch.setattr(module, "is_served", lambda device: True)


def layer(n_out=64, bias=False, **shape):
    weight = random_weight(n_out=n_out, **({"group_size": 64} | shape))
    return QuantLinear.from_quantized(weight, torch.randn(n_out) if bias else None)


class Block(nn.Module):
    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, each in layers.items():
            setattr(self, name, each)

    def forward(self, x):
        return self.run(self, x)


def all_of_one(module, x):
    return sum(child(x).sum(-1, keepdim=True) for child in module.children()) + x


X = torch.randn(2, 128)


def test_layers_that_get_one_tensor_are_fused_whatever_their_names():
    attention = Block(all_of_one, alpha=layer(), beta=layer(32, bias=True))
    mlp = Block(lambda m, x: m.down(m.gate(x) * m.up(x)), gate=layer(128), up=layer(128), down=layer(128))
    model = nn.Sequential(attention, mlp)
    assert fuse_layers(model, X) == [("0.alpha", "0.beta"), ("1.gate", "1.up")]
    assert model[1].down.siblings is None and model[0].alpha.siblings is model[0].beta.siblings


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"bits": 8}, "it has 8 bits, not 4"),
        ({"group_size": 32}, "it has 32 channels a group, not 64"),
        ({"act_order": True}, "it has another order of channels (g_idx)"),
        ({"symmetric": True}, "it has no zero-points"),
        ({"group_size": 48}, "the kernels' layout does not take it"),
    ],
    ids=str,
)
def test_layers_that_differ_are_named_with_the_reason_and_the_rest_is_fused(other, why, caplog):
    third = layer(**{name: value for name, value in other.items() if name != "symmetric"})
    if "symmetric" in other:
        third.qzeros.fill_(-0x77777778)
    model = Block(all_of_one, a=layer(), b=layer(), c=third)
    with caplog.at_level("INFO"):
        assert fuse_layers(model, X) == [("a", "b")]
    assert why in caplog.text and ": c" in caplog.text and "1 groups of layers fused" in caplog.text
    assert third.siblings is None


def test_layers_with_the_same_order_of_channels_are_fused():
    one = random_weight(group_size=64, act_order=True)
    model = Block(all_of_one, a=QuantLinear.from_quantized(one), b=layer())
    model.b.g_idx.copy_(one.g_idx)
    assert fuse_layers(model, X) == [("a", "b")]


def changed(module, x):
    y = module.a(x)
    return module.b(x.mul_(1)) + y


def seen_through_a_view(module, x):
    return module.a(x) + module.b(x[:])


def twice_with_two(module, x):
    return module.a(x) + module.b(x) + module.b(x + 1)


def two_at_a_time(module, x):
    z = x + 1
    return sum([module.a(x), module.a(z), module.b(x), module.b(z)])


@pytest.mark.parametrize("run", [changed, seen_through_a_view, twice_with_two, two_at_a_time])
def test_layers_with_other_inputs_are_not_fused(run):
    assert fuse_layers(Block(run, a=layer(), b=layer()), X) == []


def test_layers_that_are_not_called_or_not_by_their_module_are_not_fused(caplog):
    shared = layer()
    inner = Block(all_of_one, a=shared, b=layer())
    model = Block(lambda m, x: m.inner.a(x).sum() + m.inner.b(x).sum(), inner=inner, never=layer())
    with caplog.at_level("INFO"):
        assert fuse_layers(model, X) == []
    assert "not fused, since the forward did not call it: never" in caplog.text
    assert "its module does not call it once in a call of its own: inner.a, inner.b" in caplog.text


def test_the_forward_changes_nothing_and_its_error_leaves_nothing():
    model = Block(lambda m, x: all_of_one(m, x) + torch.rand(1), a=layer(), b=layer(), c=nn.Dropout(0.5)).train()
    wrong, numbers = torch.randn(2, 7), torch.random.get_rng_state()
    with pytest.raises(ValueError, match="128 input channels"):
        fuse_layers(model, wrong)
    assert model.a.siblings is None and not model._forward_hooks and not model._forward_pre_hooks
    assert fuse_layers(model, {"x": X}) == [("a", "b")]
    assert model.training and model.c.training and torch.equal(torch.random.get_rng_state(), numbers)


def test_without_a_gpu_nothing_is_fused_and_the_log_tells(monkeypatch, caplog):
    monkeypatch.setattr(fuse, "is_served", lambda device: False)
    model = Block(all_of_one, a=layer(), b=layer())
    before = copy.deepcopy(model.state_dict())
    assert fuse_layers(model, X) == [] and "no layers are fused: none is on a GPU" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
