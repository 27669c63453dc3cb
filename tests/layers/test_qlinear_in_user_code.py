"""QuantLinear where users put it: activations in place, compiled and exported code, checkpointing, functional calls."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from random_weights import random_weight
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from gptq_plugin.layers.qlinear import QuantLinear

# In-order and with act_order, with words that do not divide, and with one group.
SHAPES = [{"bits": bits, "act_order": order} for bits in (2, 3, 4, 8) for order in (False, True)]
SHAPES += [{"bits": 3, "n_in": 75, "n_out": 37, "group_size": 15}, {"bits": 4, "group_size": -1}]


def layer_of(bias=True, **shape) -> QuantLinear:
    weight = random_weight(**shape)
    return QuantLinear.from_quantized(weight, torch.randn(len(weight.codes)) if bias else None)


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_output_may_be_changed_in_place_under_grad(leading, dtype):
    layer = layer_of()
    x = torch.randn(*leading, 128, dtype=dtype, requires_grad=True)
    nn.Sequential(layer, nn.ReLU(inplace=True))(x).sum().backward()
    changed, x.grad = x.grad, None
    torch.relu(layer(x)).sum().backward()
    assert torch.equal(changed, x.grad)
    y = layer(x)
    y += 1
    y.mul_(2)
    assert torch.equal(y, (layer(x) + 1) * 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_compiles_as_one_graph_and_exports(shape):
    layer = layer_of(bias=shape.get("bits") != 3, **shape)
    x = torch.randn(2, 3, layer.in_features)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert close(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,), strict=shape["bits"] == 4)
    assert close(exported.module()(x), layer(x))


def test_a_compiled_layer_gives_the_gradient_of_the_layer():
    layer = layer_of(act_order=True)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU(inplace=True)), fullgraph=True, backend="aot_eager")
    grads = []
    for call in (compiled, lambda x: torch.relu(layer(x))):
        x = torch.ones(4, 128, requires_grad=True)
        call(x).square().sum().backward()
        grads.append(x.grad)
    assert close(*grads)


@pytest.mark.parametrize("assign", [False, True])
def test_an_order_that_is_loaded_later_is_computed_with_also_by_compiled_code(assign):
    plain, ordered = layer_of(), layer_of(act_order=True)
    x = torch.randn(3, 128)
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    before = plain(x), compiled(x)
    plain.load_state_dict(ordered.state_dict(), assign=assign)
    assert not close(before[0], ordered(x))
    assert torch.equal(plain(x), ordered(x)) and close(compiled(x), ordered(x))
    moved = plain.to(torch.float64)
    assert close(moved(x.double()).float(), ordered(x)) and close(compiled(x), ordered(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_a_second_use_of_the_output(reentrant):
    block = nn.Sequential(nn.Linear(128, 128), layer_of(n_out=128), nn.ReLU(inplace=True), nn.Linear(128, 8))

    def loss(y):
        return (y * y.detach()).sum() + y.square().sum()

    x = torch.randn(4, 128, requires_grad=True)
    loss(checkpoint(block, x, use_reentrant=reentrant)).backward()
    found, x.grad = x.grad, None
    loss(block(x)).backward()
    assert torch.equal(found, x.grad)
    layer = block[1]
    y = layer(x)
    assert torch.equal((y * y.sigmoid() + y).isfinite(), torch.ones_like(y, dtype=torch.bool))


def test_double_backward_reaches_what_comes_before():
    layer = layer_of(n_out=128)
    x = torch.randn(4, 128, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    float_layer = nn.Linear(128, 128)
    float_layer.load_state_dict({"weight": layer.dequantize(), "bias": layer.bias})
    (expected,) = torch.autograd.grad(float_layer(x).pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.allclose(second, expected, rtol=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_vmap_grad_and_functional_call(act_order):
    layer, other = layer_of(act_order=act_order), layer_of(act_order=not act_order)
    x = torch.randn(2, 3, 128)
    assert close(vmap(layer)(x), layer(x))
    assert close(vmap(layer, in_dims=1, out_dims=1)(x), layer(x))
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    assert close(grad(lambda t: layer(t).square().sum())(x), leaf.grad)
    assert close(vmap(grad(lambda t: layer(t).square().sum()))(x), leaf.grad)
    before = layer(x)
    assert torch.equal(functional_call(layer, dict(other.named_buffers()), (x,)), other(x))
    assert torch.equal(layer(x), before), "what it derived from the other's buffers is gone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients_it_computes_the_same_and_transforms_are_still_seen(dtype):
    layer, x = layer_of(), torch.randn(1, 128, dtype=dtype)
    with torch.no_grad(), warnings.catch_warnings():
        y = layer(x)
        warnings.simplefilter("error", UserWarning)  # vmap by itself would have them: operators one by one
        assert close(vmap(layer)(x), y)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            layer(forward_ad.make_dual(x, torch.ones_like(x)))
    assert torch.equal(y, layer(x)) and not y.requires_grad
    factor = torch.ones((), dtype=dtype, requires_grad=True)
    y *= factor  # a view that was made without gradients would refuse
    assert y.requires_grad


def test_a_copy_of_a_used_layer_computes_the_same_and_is_a_layer_of_its_own():
    layer = layer_of()
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    before = layer(x)
    copied = copy.deepcopy(layer)
    copied.scales *= 2
    assert torch.equal(layer(x), before) and not torch.equal(copied(x), before)


def test_it_takes_its_input_by_the_name_that_linear_has():
    layer = layer_of()
    x = torch.randn(3, 128)
    assert torch.equal(layer(input=x), layer(x))


def test_autocast_leaves_float64_alone_as_it_does_for_a_float_layer():
    layer, x = layer_of(), torch.randn(3, 128, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == nn.Linear(128, 48, dtype=torch.float64)(x).dtype == torch.float64
        assert layer(x.float()).dtype == torch.bfloat16
