"""Modules are replaced wherever they occur in the tree, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules, swapped


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(self.first, nn.ReLU()), nn.Sequential(nn.Linear(4, 4))])


def test_swap_replaces_a_shared_module_wherever_it_occurs_and_nothing_else():
    model, new = Tied(), nn.Linear(4, 4)
    relu, other = model.blocks[0][1], model.blocks[1][0]
    swap_modules(model, {"blocks.0.0": new})
    assert model.first is new and model.blocks[0][0] is new
    assert model.blocks[0][1] is relu and model.blocks[1][0] is other


def test_swap_may_wrap_what_it_replaces():
    model = Tied()
    old = model.first
    swap_modules(model, {"first": nn.Sequential(old, nn.Tanh())})
    assert model.first is model.blocks[0][0] and model.first[0] is old


def test_swap_refuses_an_unknown_name_before_it_changes_anything():
    model = Tied()
    first = model.first
    with pytest.raises(ValueError, match=r"no submodule 'blocks\.0\.7' to replace; did you mean 'blocks\.0"):
        swap_modules(model, {"first": nn.Linear(4, 4), "blocks.0.7": nn.Linear(4, 4)})
    assert model.first is first
    with pytest.raises(ValueError, match="no submodule ''"):
        swap_modules(model, {"": nn.Linear(4, 4)})


def test_swap_refuses_two_replacements_of_one_module():
    model, new = Tied(), nn.Linear(4, 4)
    swap_modules(model, {"first": new, "blocks.0.0": new})
    with pytest.raises(ValueError, match=r"'blocks\.0\.0' is a shared module"):
        swap_modules(model, {"first": nn.Linear(4, 4), "blocks.0.0": nn.Linear(4, 4)})


def encoder_layer(activation):
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=activation, batch_first=True).eval()


@pytest.mark.parametrize(
    ("activation", "path"),
    [(nn.functional.relu, 1), (nn.ReLU(), 1), (nn.functional.gelu, 2), (nn.GELU(), 2), (torch.tanh, 0)],
)
def test_pytorchs_fused_encoder_path_is_off_while_a_linear_is_quantized_and_on_again_afterwards(activation, path):
    model = nn.Sequential(encoder_layer(activation))
    layer, linear = model[0], model[0].linear1
    before = layer.activation_relu_or_gelu
    swap_modules(model, {"0.linear1": QuantLinear(16, 32, 4, 16, bias=True, dtype=torch.float32)})
    assert layer.activation_relu_or_gelu == 0
    with torch.no_grad():
        assert model(torch.randn(2, 5, 16)).shape == (2, 5, 16)
    swap_modules(model, {"0.linear1": linear})
    assert layer.activation_relu_or_gelu == path == before


def test_swap_names_the_nearest_modules_and_nothing_when_there_is_none():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("alpha", "alphb", "alphc", "alphd")})
    with pytest.raises(ValueError, match=r"no submodule 'alph' to replace; did you mean '\w+' or '\w+' or '\w+'\?$"):
        swap_modules(model, {"alph": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"no submodule 'xyz' to replace$"):
        swap_modules(model, {"xyz": nn.Linear(2, 2)})


@pytest.mark.parametrize("old, new", [(True, False), (False, True), (False, False)])
def test_hooks_go_to_a_quantized_layer_and_back_and_to_no_other(old, new):
    layers = [QuantLinear(32, 8, 4, 32) if quantized else nn.Linear(32, 8) for quantized in (old, new)]
    model, calls = nn.Sequential(layers[0]), []
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    swap_modules(model, {"0": layers[1]})
    with torch.no_grad():
        model(torch.ones(2, 32, dtype=torch.float16 if new else torch.float32))
    assert len(calls) == (old or new)


def test_modules_are_swapped_for_a_block_also_where_it_fails():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    first, other = model[0], nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="inside"), swapped(model, {"0": other}):
        assert model[0] is other
        raise RuntimeError("inside")
    assert model[0] is first
