"""What a forward has written outside its local variables is seen, named and undone."""

from __future__ import annotations

import sys
import types
import weakref
from collections import deque

import pytest
import torch
from torch import nn

from gptq_plugin.walk.places import MISSING
from gptq_plugin.walk.watched_places import WatchedPlaces


class Slotted:
    __slots__ = ("__weakref__", "empty", "value")

    def __init__(self, value):
        self.value = value


class OneSlot:
    __slots__ = "value"


def _cycle():
    one = []
    one.append(one)
    return one


GLOBAL, OTHER = [1], None


class Model(nn.Module):
    of_class = None

    def forward(self, x):
        return GLOBAL, OTHER, x

    def __init__(self, **attributes):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("buffer", torch.zeros(4))
        self.none, self.number = None, 1
        vars(self).update(attributes)


def _watched(model, lent=()):
    return WatchedPlaces(model, lambda value: any(value is one for one in lent))


def _named(found):
    return {str(place): held for place, held in found.items()}


def test_a_place_that_is_bound_to_something_else_is_named_with_what_it_held():
    model, module, buffer = Model(), nn.Identity(), torch.ones(4)
    watched, held, inner = _watched(model), model.buffer, model.inner
    assert watched.written() == {}
    model.number, model.new, model.buffer, model.inner, model.last.note = 2, None, buffer, module, "a"
    del model.none
    Model.of_class = 3
    try:
        found = watched.written()
        assert _named(found) == {
            ".number": 1,
            ".new": MISSING,
            ".none": None,
            ".buffer": held,
            ".inner": inner,
            "last.note": MISSING,
            "Model.of_class": None,
        }
        assert [str(place) for place in found if place.is_buffer] == [".buffer"]
    finally:
        watched.restore()
    assert (model.number, model.none, model.buffer is held, model.inner is inner) == (1, None, True, True)
    assert not hasattr(model, "new") and not hasattr(model.last, "note") and Model.of_class is None
    assert watched.written() == {}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("last.first", lambda model: model.last.register_buffer("first", None)),  # among buffers that were none
        ("last.note", lambda model: setattr(model.last, "note", None)),  # behind all others, alike the last
        ("buffer", lambda model: model._buffers.clear()),
        ("Model.new", lambda model: setattr(Model, "new", None)),
    ],
    ids=["empty", "last", "emptied", "class"],
)
def test_one_place_that_comes_or_goes_is_seen(name, change):
    model = Model()
    watched = _watched(model)
    change(model)
    try:
        assert [str(place).removeprefix(".") for place in watched.written()] == [name]
    finally:
        watched.restore()
    assert watched.written() == {}


def test_a_variable_that_is_bound_to_something_else_is_named_with_what_it_held(monkeypatch):
    watched, held = _watched(Model()), GLOBAL
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", [2])
    assert _named(watched.written()) == {f"{__name__}.GLOBAL": held}
    watched.restore()
    assert GLOBAL is held and watched.written() == {}


def test_attributes_of_functions_are_nobodys_state():
    model = Model(kept=[_cycle])
    watched = _watched(model)
    _cycle.note = 1
    try:
        assert watched.written() == {}
    finally:
        del _cycle.note


def test_what_pytorch_and_python_keep_themselves_is_nobodys_state():
    model = Model()
    watched = _watched(model)
    model.eval().inner.register_forward_hook(lambda *_: None)
    Model.__doc__, before = "Another.", Model.__doc__
    try:
        model.number = 2
        assert _named(watched.written()) == {".number": 1}
    finally:
        Model.__doc__ = before


def test_a_buffer_that_is_lent_is_nobodys_state_and_another_tensor_is():
    model, lent = Model(attribute=None), torch.ones(4)
    watched = _watched(model, [lent])
    model.buffer = model.attribute = lent
    assert _named(watched.written()) == {".attribute": None}
    model.buffer = None
    assert sorted(_named(watched.written())) == [".attribute", ".buffer"]


@pytest.mark.parametrize(
    "make, change, read",
    [
        (lambda: [1, 2], lambda one: one.append(3), list),
        (lambda: deque([1, 2], maxlen=2), lambda one: one.append(3), list),
        (lambda: {"a": 1}, lambda one: one.update(b=2), dict),
        (lambda: {"a": 1}, lambda one: one.update(a=2), dict),
        (lambda: {1}, lambda one: one.add(2), set),
        (lambda: types.SimpleNamespace(a=1), lambda one: setattr(one, "b", 2), lambda one: dict(vars(one))),
        (lambda: types.SimpleNamespace(a=1), lambda one: delattr(one, "a"), lambda one: dict(vars(one))),
        (types.SimpleNamespace, lambda one: setattr(one, "b", 2), lambda one: dict(vars(one))),
        (lambda: Slotted(1), lambda one: setattr(one, "value", 2), lambda one: one.value),
        (lambda: Slotted(1), lambda one: setattr(one, "empty", 2), lambda one: hasattr(one, "empty")),
        (OneSlot, lambda one: setattr(one, "value", 2), lambda one: hasattr(one, "value")),
        (lambda: Slotted([1]), lambda one: one.value.append(2), lambda one: list(one.value)),
        (lambda: ({}, {"a": [[1], 2]}, {}), lambda one: one[1]["a"][0].clear(), lambda one: one[1]["a"][0][:]),
        (_cycle, lambda one: one[0].append(1), len),
        (lambda: torch.ones(3), lambda one: one.mul_(2), lambda one: one.tolist()),
        (lambda: torch.ones(2**18 + 1), lambda one: one.mul_(2), lambda one: float(one.sum())),
        (lambda: [torch.ones(3)], lambda one: one[0].mul_(2), lambda one: one[0].tolist()),
    ],
)
def test_what_has_changed_inside_is_seen_at_every_place_that_refers_to_it_and_undone(make, change, read):
    value = make()
    model = Model(kept=value, other=(value,), untouched=[1])
    watched, before = _watched(model), read(value)
    assert watched.written() == {}
    change(value)
    model.number = 2
    assert read(value) != before
    written = watched.written()
    found = _named(written)
    assert found.keys() == {".kept", ".other", ".number"} and found[".kept"] is value
    assert any(place.get() is value for place in written)
    watched.restore()
    assert read(value) == before and model.kept is value and model.number == 1
    assert watched.written() == {}


def test_a_reference_to_an_object_is_no_change_of_it():
    model = Model(kept=Slotted(1))
    watched = _watched(model)
    kept = weakref.ref(model.kept)
    assert watched.written() == {} and kept() is model.kept


def test_weights_are_not_watched_and_tensors_without_a_version_are_left_alone():
    with torch.inference_mode():
        unversioned = torch.ones(2)
    model = Model(unversioned=unversioned, meta=torch.ones(2, device="meta"), sparse=torch.eye(2).to_sparse())
    model.tied = [model.inner.weight]
    watched = _watched(model)
    with torch.no_grad():
        model.inner.weight.mul_(2)
        model.meta.mul_(2)
    with torch.inference_mode():
        unversioned.mul_(2)
    assert watched.written() == {}


def test_what_refers_to_a_module_of_the_model_or_to_very_much_is_not_looked_into():
    model = Model(few=[[] for _ in range(300)], many=[[] for _ in range(301)], elsewhere=[nn.Linear(2, 2)])
    model.holder = {"notes": [], "model": model}
    watched = _watched(model)
    model.few[0].append(1)
    model.many[0].append(1)
    model.holder["notes"].append(1)
    model.elsewhere.append(1)
    assert _named(watched.written()).keys() == {".few", ".elsewhere"}


def test_modules_that_are_not_the_models_own_are_not_watched():
    class Other(nn.ModuleDict):
        keeps_nothing = True

    model = nn.Module()
    model.own, model.other = nn.Linear(2, 2), Other({"layer": nn.Linear(2, 2)})
    watched = WatchedPlaces(model, lambda _: False)
    model.own.seen, model.other.seen, model.other["layer"].seen = 1, 2, 3
    assert sorted(str(place) for place in watched.written()) == ["other.layer.seen", "own.seen"]
