"""Batches that run one at a time give each group the inputs that lock-step gives it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from gptq_plugin.walk.groups import find_groups
from gptq_plugin.walk.kept_state import KeptState
from gptq_plugin.walk.one_by_one import walk_one_by_one

from models import tiny_llama
from walks import hooks_left, linears, walk


def _one_by_one(model, calls, change=None, agree=None):
    layers, counted, order = linears(model), {}, []

    def observe(group, number, x):
        counted.setdefault(group.names[0], []).append((number, x.clone()))

    state = KeptState(model)
    groups = find_groups(layers, calls[0], state=state)
    for stop in walk_one_by_one(groups, layers, calls, observe, state=state, **({"agree": agree} if agree else {})):
        order.append(stop.group)
        if change:
            change(stop)
    return order, counted


def _halving(model):
    layers = linears(model)

    def change(stop):
        for name in stop.group.names:
            layers[name].weight.data.mul_(0.5)

    return change


def test_inputs_are_those_of_lock_step_through_what_is_quantized():
    batches = [torch.arange(i, i + 12)[None] for i in range(3)]
    models = [tiny_llama(), tiny_llama()]
    models[1].load_state_dict(models[0].state_dict())
    calls = [[lambda ids=ids, model=model: model(input_ids=ids) for ids in batches] for model in models]
    _, order, counted = walk(models[0], calls[0], _halving(models[0]))
    alone, own = _one_by_one(models[1], calls[1], _halving(models[1]))
    assert alone == order and own.keys() == counted.keys()
    for name, inputs in own.items():
        assert [number for number, _ in inputs] == [0, 1, 2], name
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(inputs, counted[name])), name
    assert hooks_left(models[1]) == 0


def test_a_layer_that_is_called_again_counts_all_its_inputs():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, times):
            for _ in range(times):
                x = torch.tanh(self.layer(x))
            return self.last(x)

    model = Looped()
    x = torch.randn(2, 8)
    order, counted = _one_by_one(model, [lambda: model(x, 3), lambda: model(x, 2), lambda: model(x, 4)])
    assert [group.names for group in order] == [("layer",), ("last",)]
    assert [number for number, _ in counted["layer"]] == [0, 0, 0, 1, 1, 2, 2, 2]  # of the fourth call, as in lock-step
    assert [number for number, _ in counted["last"]] == [0, 1, 2]


def test_an_input_that_layers_of_a_group_share_counts_once_a_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x) + self.b(x)
            return self.a(y) + self.b(y)

    model = Shared()
    order, counted = _one_by_one(model, [lambda: model(torch.ones(2, 8)), lambda: model(torch.zeros(1, 8))])
    assert [(group.names, group.calls) for group in order] == [(("a", "b"), 2)]
    second = model.a(torch.ones(2, 8)) + model.b(torch.ones(2, 8))
    assert [(number, len(x)) for number, x in counted["a"]] == [(0, 2), (0, 2), (1, 1), (1, 1)]
    assert torch.equal(counted["a"][0][1], torch.ones(2, 8)) and torch.equal(counted["a"][1][1], second)


def test_calls_on_threads_of_the_model_do_not_count():
    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            thread = threading.Thread(target=self.layer, args=(x + 1,))
            thread.start()
            thread.join()
            return self.layer(x)

    model = Threaded()
    _, counted = _one_by_one(model, [lambda: model(torch.zeros(1, 4))])
    assert [(number, x.tolist()) for number, x in counted["layer"]] == [(0, [[0.0] * 4])]


def test_every_run_of_a_batch_begins_with_what_the_model_kept_before_the_walk():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.runs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), 0

        def forward(self, x):
            self.runs += 1
            for layer in self.layers:
                x = layer(x) * 0 + self.runs
            return x

    model = Counting()
    _, counted = _one_by_one(model, [lambda: model(torch.ones(1, 4))] * 2)
    assert [float(x[0, 0]) for inputs in counted.values() for _, x in inputs] == [1.0] * 6
    assert model.runs == 0


def test_a_batch_that_keeps_what_cannot_be_copied_begins_with_it():
    class Generating(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.numbers = nn.Linear(4, 4), None

        def forward(self, x):
            numbers, self.numbers = self.numbers, (one for one in "ab")  # which cannot be copied
            assert numbers is first
            return self.layer(x)

    model = Generating()
    model.numbers = first = (one for one in "a")
    _, counted = _one_by_one(model, [lambda: model(torch.ones(1, 4))] * 2)
    assert [number for number, _ in counted["layer"]] == [0, 1] and model.numbers is first


def test_layers_that_no_batch_reaches_are_left_out_unless_another_rank_reaches_them():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.one(x)

    model, calls = Either(), [lambda: model(torch.ones(1, 8))]
    assert [group.names for group in _one_by_one(model, calls)[0]] == [("one",)]
    assert [group.names for group in _one_by_one(model, calls, agree=lambda _: 0)[0]] == [("one",), ("other",)]
    groups, layers = find_groups(linears(model), calls[0]), linears(model)
    assert [stop.group.names for stop in walk_one_by_one(groups, layers, calls, lambda *_: None)] == [("one",)]
    calls = [lambda: model(torch.ones(1, 8)), lambda: model.other(torch.ones(1, 8)), lambda: None]
    order, counted = _one_by_one(model, calls)
    assert [group.names for group in order] == [("one",), ("other",)]
    assert [number for inputs in counted.values() for number, _ in inputs] == [0, 1]


def test_only_inputs_that_are_not_finite_are_kept_for_the_error():
    model = nn.Sequential(nn.Linear(4, 4))
    data = [torch.ones(2, 4), torch.full((2, 4), torch.nan)]
    found, kept = [], []

    def look(stop):
        found.append(dict(stop.inputs))
        kept.append(stop.inputs)

    _one_by_one(model, [lambda x=x: model(x) for x in data], look)
    assert found[0][0].numel() == 0 and found[0][1] is data[1]
    assert kept == [{}]  # a stop holds them no longer than it lasts


def test_an_error_names_its_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    calls = [lambda: model(torch.ones(2, 4)), lambda: model(torch.ones(2, 5))]
    with pytest.raises(RuntimeError) as raised:
        _one_by_one(model, calls)
    assert "batch 1" in str(getattr(raised.value, "__notes__", "batch 1"))
    assert hooks_left(model) == 0
