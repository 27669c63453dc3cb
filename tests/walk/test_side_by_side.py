"""Variants of a forward run side by side, call by call."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from gptq_plugin.walk.kept_state import KeptState
from gptq_plugin.walk.side_by_side import side_by_side

from walks import hooks_left, linears, threads_left


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(self.a(x)))


def test_every_call_is_reached_by_all_before_any_goes_on():
    model, seen = Twice(), []
    inputs = {3: torch.zeros(1, 4), 7: torch.ones(1, 4)}
    forwards = {number: lambda x=x: model(x) for number, x in inputs.items()}
    waited = []

    @contextlib.contextmanager
    def waiting(number, name):
        waited.append((number, name))
        yield

    side_by_side(linears(model), forwards, lambda number, name, x: seen.append((number, name, x.clone())), waiting)
    calls = [(number, name) for name in ("a", "a", "b") for number in (3, 7)]
    assert [(number, name) for number, name, _ in seen] == calls == waited
    with torch.no_grad():
        assert torch.equal(seen[5][2], model.a(model.a(inputs[7])))
    assert hooks_left(model) == 0 and threads_left() == []


def test_forwards_of_other_lengths_end_by_themselves():
    model, seen = Twice(), []
    forwards = {0: lambda: model(torch.zeros(1, 4)), 1: lambda: model.a(torch.zeros(1, 4))}
    side_by_side(linears(model), forwards, lambda number, name, x: seen.append((number, name)))
    assert seen == [(0, "a"), (1, "a"), (0, "a"), (0, "b")]


def test_all_end_when_it_is_enough():
    model, seen = Twice(), []
    forwards = {number: lambda: model(torch.zeros(1, 4)) for number in (0, 1)}
    visit = lambda number, name, x: seen.append((number, name))  # noqa: E731
    side_by_side(linears(model), forwards, visit, enough=lambda: len(seen) >= 4)
    assert seen == [(0, "a"), (1, "a")] * 2
    assert hooks_left(model) == 0 and threads_left() == []


def test_an_error_ends_all():
    model = Twice()

    def failing():
        model.a(torch.zeros(1, 4))
        raise KeyError("no")

    with pytest.raises(KeyError):
        side_by_side(linears(model), {0: lambda: model(torch.zeros(1, 4)), 1: failing}, lambda *_: None)
    assert hooks_left(model) == 0 and threads_left() == []


class Remembers(nn.Module):
    """Keeps its input on itself, and reads it behind a layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.given = None

    def forward(self, x):
        self.given = x
        self.a(x)
        return self.b(self.given)


def test_each_forward_reads_what_it_has_kept_itself():
    model, seen = Remembers(), []
    inputs = [torch.zeros(1, 4), torch.ones(1, 4)]
    forwards = {number: lambda x=x: model(x) for number, x in enumerate(inputs)}
    side_by_side(
        linears(model), forwards, lambda number, name, x: seen.append((number, name, x)), state=KeptState(model)
    )
    assert [(number, name) for number, name, _ in seen] == [(0, "a"), (1, "a"), (0, "b"), (1, "b")]
    assert torch.equal(seen[2][2], inputs[0]) and torch.equal(seen[3][2], inputs[1])
    assert model.given is None
