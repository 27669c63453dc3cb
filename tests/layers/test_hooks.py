"""Hooks of a layer go on with the layer that takes its place, and their handles too."""

from __future__ import annotations

import pytest
import torch
from random_weights import random_weight
from torch import nn

from gptq_plugin.layers.hooks import saves_its_own
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules


def swapped():
    """A model with a layer of several hooks that count their calls; the model, the handles, and the calls."""
    model = nn.Sequential(nn.Linear(128, 48), nn.ReLU())
    calls = []
    layer = model[0]
    handles = [
        layer.register_forward_pre_hook(lambda m, args: calls.append("pre") or (args[0] * 2,)),
        layer.register_forward_pre_hook(lambda m, args, kw: calls.append("pre kw") or None, with_kwargs=True),
        layer.register_forward_pre_hook(lambda m, args: calls.append("first"), prepend=True),
        layer.register_forward_hook(lambda m, args, y: calls.append("post") or y + 1),
        layer.register_forward_hook(lambda m, args, kw, y: calls.append("post kw") or None, with_kwargs=True),
        layer.register_forward_hook(lambda *_: calls.append("always"), always_call=True),
        layer.register_full_backward_hook(lambda *_: calls.append("back")),
        layer.register_full_backward_pre_hook(lambda *_: calls.append("before back")),
    ]
    quantized = QuantLinear.from_quantized(random_weight(), torch.randn(48))
    swap_modules(model, {"0": quantized})
    return model, layer, quantized, handles, calls


def test_every_kind_of_hook_is_called_in_its_order_and_changes_what_it_changed():
    model, _, quantized, _, calls = swapped()
    x = torch.randn(3, 128, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert calls == ["first", "pre", "pre kw", "post", "post kw", "always", "before back", "back"]
    plain = QuantLinear.from_quantized(random_weight(), None)
    plain.load_state_dict(quantized.state_dict(), strict=False)
    plain.bias = quantized.bias
    assert torch.equal(y, torch.relu(plain(x * 2) + 1))


def test_a_handle_removes_its_hook_from_the_layer_that_took_the_place_and_from_the_float_one():
    model, layer, _, handles, calls = swapped()
    for handle in handles:
        handle.remove()
    model(torch.randn(3, 128))
    layer(torch.randn(3, 128))
    assert calls == []


def test_a_hook_that_was_called_on_an_error_still_is():
    model, _, _, _, calls = swapped()
    with pytest.raises(ValueError):
        model(torch.randn(3, 64))
    assert "always" in calls and "post" not in calls


def test_hooks_registered_meanwhile_stay_with_the_float_layer_that_comes_back():
    model, layer, quantized, _, calls = swapped()
    handle = quantized.register_forward_hook(lambda *_: calls.append("new"))
    swap_modules(model, {"0": layer})
    model(torch.randn(3, 128))
    assert "new" in calls
    handle.remove()
    calls.clear()
    model(torch.randn(3, 128))
    assert "new" not in calls and "post" in calls


def test_other_modules_do_not_exchange_hooks():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_forward_hook(lambda *_: None)
    new = nn.Linear(8, 8)
    swap_modules(model, {"0": new})
    assert not new._forward_hooks


def _scaled(layer, state, prefix, _):
    state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]


def _more(layer, state, prefix, _):
    state[f"{prefix}scale"] = torch.ones(1)


def _less(layer, state, prefix, _):
    del state[f"{prefix}bias"]


@pytest.mark.parametrize("hook", [_scaled, _more, _less])
def test_a_hook_that_saves_something_else_is_found(hook):
    layer = nn.Linear(8, 8)
    assert saves_its_own(layer)
    layer.register_state_dict_post_hook(hook)
    assert not saves_its_own(layer)


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
        lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),  # as FSDP does
        lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
        lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
    ],
)
def test_hooks_that_change_nothing_in_a_state_dict_are_no_obstacle(register):
    layer = nn.Linear(8, 8, bias=False)
    register(layer)
    assert saves_its_own(layer)
