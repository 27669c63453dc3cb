"""Inputs of layers: which tensors are seen, and which are the same."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

from gptq_plugin.walk import lockstep
from gptq_plugin.walk.groups import find_groups
from gptq_plugin.walk.layer_inputs import SeenInput, watch_inputs

from walks import hooks_left, linears, walk


def test_a_reused_address_is_not_a_shared_input():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(50))

        def forward(self, x):
            for layer in self.layers:
                layer(torch.zeros(4, 8))  # freed at once: the next one often gets its address
                gc.collect(0)
            return x

    model = Chain()
    groups = find_groups(linears(model), lambda: model(torch.zeros(1, 8)))
    assert all(len(group.names) == 1 for group in groups)


def test_an_input_changed_in_place_is_another_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    model = InPlace()
    calls = [lambda: model(torch.ones(3, 8)), lambda: model(torch.full((3, 8), 3.0))]
    outputs, order, counted = walk(model, calls)
    assert [group.names for group in order] == [("a",), ("b",)]
    assert [float(x.mean()) for _, x in counted["a"]] == [1, 3]  # what a saw, not what the buffer holds later
    assert [float(x.mean()) for _, x in counted["b"]] == [2, 6]


def test_inputs_given_by_keyword_are_seen():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(input=x)

    model = ByKeyword()
    _, order, counted = walk(model, [lambda: model(torch.ones(2, 4))])
    assert counted["a"][0][1].shape == (2, 4)


def test_a_hook_of_the_users_that_changes_a_layers_input_comes_first():
    """The observed input is the one the layer multiplies, after hooks that rotate or scale it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layers, seen = linears(model), {}
    call = lambda: model(torch.ones(1, 4))  # noqa: E731
    groups = find_groups(layers, call)
    for _ in lockstep.walk(groups, layers, [call], lambda group, number, x: seen.setdefault(group.names, x.clone())):
        pass
    torch.testing.assert_close(seen[("1",)], 2 * model[0](torch.ones(1, 4)).detach())


@pytest.mark.parametrize("ends", ["normally", "with an error"])
def test_no_hook_stays_and_what_the_visitor_returns_changes_nothing(ends):
    model, seen, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [], torch.ones(1, 4)

    def visit(name, read):
        seen.append((name, read))
        return torch.zeros(1, 4)  # a hook's result would be the layer's input

    with pytest.raises(KeyError) if ends == "with an error" else contextlib.nullcontext(), torch.no_grad():
        plain = model(x)
        with watch_inputs({"first": model[0]}, visit):
            assert torch.equal(model(x), plain)
            if ends == "with an error":
                raise KeyError("solver")
    assert [name for name, _ in seen] == ["first"] and seen[0][1] is x and hooks_left(model) == 0


def test_an_input_is_the_same_only_while_its_tensor_lives_unchanged():
    x = torch.ones(2, 4)
    seen = SeenInput(x)
    assert seen.is_same(x) and not seen.is_same(x.clone()) and not seen.is_same(x.view(2, 4))
    x.add_(1)
    assert not seen.is_same(x) and SeenInput(x).is_same(x)
    with torch.inference_mode():
        inferred = torch.ones(2, 4)  # has no version
    assert SeenInput(inferred).is_same(inferred)
    alive = weakref.ref(x)
    seen = SeenInput(x)
    del x
    assert alive() is None and not seen.is_same(inferred)
