"""Batches that disturb each other where no exchange reaches are found by trial."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from gptq_plugin.walk.disturbance import disturbed_layer
from gptq_plugin.walk.kept_state import KeptState

from walks import linears


class Keeping(nn.Module):
    """Keeps the mean of its input where `store` does, and adds it after the first layer."""

    def __init__(self, store, load):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.memory = np.zeros(1, dtype=np.float32)
        self.store, self.load = store, load

    def forward(self, x):
        self.store(self, x.mean().item())
        return self.second(self.first(x) + self.load(self))


class Remembering(nn.Module):
    """Has layers, and a memory that Python does not show; what it does with it is up to its forward."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(width, width) for _ in range(3))
        self.memory = np.zeros(1, dtype=np.float32)


def in_an_array():
    def store(model, value):
        model.memory[0] = value

    return Keeping(store, lambda model: float(model.memory[0]))


def in_a_generator():
    def remember():
        value = 0.0
        while True:
            sent = yield value
            value = value if sent is None else sent

    memory = remember()
    next(memory)
    return Keeping(lambda model, value: memory.send(value), lambda model: next(memory))


def in_the_data_of_a_tensor():
    kept = torch.zeros(1)

    def store(model, value):
        kept.data.fill_(value)  # which grows no version

    return Keeping(store, lambda model: float(kept))


def in_an_attribute():
    def store(model, value):
        model.mean = value

    return Keeping(store, lambda model: model.mean)


def _disturbed(model, first, second, waited=None):
    def waiting(number, name):
        if waited is not None:
            waited.append((number, name))
        return contextlib.nullcontext()

    state = KeptState(model)
    with torch.no_grad():
        model(first)
    state.end_first()
    return disturbed_layer(linears(model), lambda: model(first), lambda: model(second), waiting, state)


@pytest.mark.parametrize("make", [in_an_array, in_a_generator, in_the_data_of_a_tensor])
def test_the_first_layer_that_reads_another_batchs_state_is_named(make):
    assert _disturbed(make(), torch.ones(3, 8), torch.full((3, 8), 5.0)) == "second"


def test_what_is_exchanged_disturbs_nothing():
    model = in_an_attribute()
    assert _disturbed(model, torch.ones(3, 8), torch.full((3, 8), 5.0)) is None
    assert not hasattr(model, "mean")


def test_every_run_waits_as_it_is_told():
    waited = []
    assert _disturbed(in_an_array(), torch.ones(3, 8), torch.full((3, 8), 5.0), waited)
    alone, together = [(0, "first"), (0, "second")], [(0, "first"), (1, "first"), (0, "second"), (1, "second")]
    assert waited == [*alone, *together, *alone]


@pytest.mark.parametrize("size", [8, 4096])
def test_one_number_that_differs_is_a_disturbance(size):
    class Last(Remembering):
        def forward(self, x):
            self.memory[0] = x.sum().item()
            y = torch.zeros_like(self.first(x))
            y[0, 1 if size == 8 else 1024] = float(self.memory[0])
            return self.second(y)

    assert _disturbed(Last(size), torch.ones(1, size), torch.full((1, size), 5.0)) == "second"


def test_a_disturbance_is_seen_beside_noise_in_layers_of_any_scale():
    class Noisy(Remembering):
        def forward(self, x):
            self.memory[0] = x.mean().item()
            self.first(x)
            self.second(1e6 * (x + 1e-3 * torch.randn(3, 8)))
            return self.third(1e-6 * x * float(self.memory[0]))

    assert _disturbed(Noisy(), torch.ones(3, 8), torch.full((3, 8), 1.5)) == "third"


@pytest.mark.parametrize("other", ["another layer", "more rows"])
def test_another_call_is_a_disturbance(other):
    class Choosing(Remembering):
        def forward(self, x):
            self.memory[0] = x.mean().item()
            self.first(x)
            if self.memory[0] < 2:
                return self.second(torch.zeros(2, 8))
            return self.third(torch.zeros(2, 8)) if other == "another layer" else self.second(torch.zeros(3, 8))

    assert _disturbed(Choosing(), torch.ones(3, 8), torch.full((3, 8), 5.0)) == "second"


def test_noise_in_the_model_is_no_disturbance():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x) + torch.randn(3, 8))

    assert _disturbed(Noisy(), torch.ones(3, 8), torch.full((3, 8), 5.0)) is None


def test_nan_in_the_data_is_no_disturbance():
    assert _disturbed(in_an_attribute(), torch.full((3, 8), torch.nan), torch.ones(3, 8)) is None


def test_a_disturbance_is_seen_beside_nan_in_the_data():
    class Beside(Remembering):
        def forward(self, x):
            self.memory[0] = x[0, 0].item()
            return self.second(self.first(x) * 0 + x + float(self.memory[0]))

    data = torch.ones(3, 8)
    data[2] = torch.nan
    assert _disturbed(Beside(), data, torch.full((3, 8), 5.0)) == "second"


def test_another_number_of_calls_is_a_disturbance():
    model = in_an_array()
    model.forward = lambda x: _twice_after(model, x)
    assert _disturbed(model, torch.ones(3, 8), torch.full((3, 8), 5.0)) == "second"


def _twice_after(model, x):
    model.memory[0] = x.mean().item()
    x = model.first(x)
    return model.second(model.second(x)) if model.memory[0] > 1 else model.second(x)


def test_the_trial_ends_when_layers_of_every_kind_have_been_called_twice():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.down(self.up(x))

    called = []
    for layers, expected in ((20, 16), (6, 12)):
        model = nn.Sequential(nn.Linear(8, 8), *[Block() for _ in range(layers)])
        model[0].forward = lambda x: x  # called by itself, not watched
        watched = {name: layer for name, layer in linears(model).items() if name != "0"}
        for layer in watched.values():
            layer.register_forward_pre_hook(lambda *_: called.append(1), prepend=True)
        called.clear()
        disturbed_layer(
            watched,
            lambda model=model: model(torch.ones(1, 8)),
            lambda model=model: model(torch.zeros(1, 8)),
            lambda *_: contextlib.nullcontext(),
            KeptState(model),
        )
        assert len(called) == 3 * expected


def test_the_trial_waits_for_the_second_call_of_a_kind_that_is_rare():
    layers = {"rare.0": nn.Linear(8, 8), **{f"often.{i}": nn.Linear(8, 8) for i in range(18)}}
    layers |= {"rare.1": nn.Linear(8, 8), **{f"last.{i}": nn.Linear(8, 8) for i in range(30)}}
    model, called = nn.Sequential(*layers.values()), []
    for layer in model:
        layer.register_forward_pre_hook(lambda *_: called.append(1), prepend=True)
    forwards = [lambda x=x: model(x) for x in (torch.ones(1, 8), torch.zeros(1, 8))]
    disturbed_layer(layers, *forwards, lambda *_: contextlib.nullcontext(), KeptState(model))
    assert len(called) == 3 * 20


def test_a_forward_that_fails_leaves_no_thread():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x):
            self.first(x)
            raise ValueError("no")

    model = Failing()
    with pytest.raises(ValueError, match="no"):
        disturbed_layer(
            linears(model),
            lambda: model(torch.ones(1, 8)),
            lambda: model(torch.ones(1, 8)),
            lambda *_: contextlib.nullcontext(),
            KeptState(model),
        )
