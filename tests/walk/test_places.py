"""Where a model's forward can keep something besides its local variables."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from torch import nn

from gptq_plugin.walk.places import MISSING, Place, is_data, own_classes, variables

ELSEWHERE: dict[str, object] = {"STATE": {}}
exec("def read_elsewhere():\n    return STATE", ELSEWHERE)
read_elsewhere = ELSEWHERE["read_elsewhere"]


def _cell(*value):
    cell = types.CellType()
    for one in value:
        cell.cell_contents = one
    return cell


@pytest.mark.parametrize("kind", ["dictionary", "class", "cell"])
def test_what_a_place_holds_can_be_replaced_taken_away_and_put_back(kind):
    holder = {"dictionary": {"key": 1}, "class": type("Holder", (), {"key": 1}), "cell": _cell(1)}[kind]
    place = Place(holder, "key", "model.block")
    assert place.get() == 1 and str(place) == "model.block.key" and not place.is_buffer
    place.put(2)
    assert place.get() == 2
    place.put(None)
    assert place.get() is None and place.get() is not MISSING
    place.put(MISSING)
    assert place.get() is MISSING
    place.put(MISSING)
    place.put(1)
    assert place.get() == 1


def test_a_class_holds_only_what_is_its_own():
    parent = type("Parent", (), {"key": 1})
    assert Place(type("Child", (parent,), {}), "key", "Child").get() is MISSING


def test_a_place_is_known_by_its_holder_and_key():
    first, second = {"a": 1}, {"a": 1}
    place = Place(first, "a", "one name")
    assert place == Place(first, "a", "another") and hash(place) == hash(Place(first, "a", "another"))
    others = [Place(second, "a", "one name"), Place(first, "b", "one name")]
    assert all(place != other and hash(place) != hash(other) for other in others)
    assert place != "a" and place != ("one name", "a")


def test_nothing_stays_nothing_when_it_is_copied():
    assert copy.deepcopy([MISSING])[0] is MISSING


class Mixin:
    pass


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(2, 2), nn.Linear(2, 2)


class Model(Mixin, Base):
    def forward(self, x):
        return self.layer(x)


def test_a_models_own_classes_are_those_that_are_not_pytorchs():
    assert own_classes(Model()) == [Model, Mixin, Base]


def test_code_is_no_data():
    code = [print, Model, torch, property(lambda self: 1), classmethod(print), Model(), types.SimpleNamespace.__dict__]
    assert [is_data(one) for one in code] == [False] * 6 + [True]
    assert all(is_data(one) for one in (None, 1, "a", {}, [], torch.ones(2), types.SimpleNamespace()))


READ = WRITTEN = BY_A_FUNCTION = BY_A_PROPERTY = IN_A_STATIC_METHOD = IN_A_CLASS_METHOD = IN_AN_INNER_FUNCTION = 0
BY_A_DECORATED, BY_ANOTHER_DECORATED, BY_AN_INSTANCE, UNREAD, IN_A_FUNCTION_OF_A_FUNCTION = {}, {}, {}, {}, {}


def _function():
    return BY_A_FUNCTION, _function_of_a_function()


def _function_of_a_function():
    return IN_A_FUNCTION_OF_A_FUNCTION, _function  # which leads back


def _decorator(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Reads(nn.Module):
    def forward(self, x):
        global WRITTEN
        WRITTEN = READ
        return sorted(x, key=lambda one: one + IN_AN_INNER_FUNCTION), _function(), read_elsewhere(), torch.ones(1)

    @property
    def value(self):
        return BY_A_PROPERTY

    @staticmethod
    def static():
        return IN_A_STATIC_METHOD

    @classmethod
    def of_class(cls):
        return IN_A_CLASS_METHOD

    @_decorator
    def one(self):
        return BY_A_DECORATED

    @_decorator
    def another(self):
        return BY_ANOTHER_DECORATED


def test_globals_are_found_wherever_the_models_code_refers_to_them():
    model = Reads()
    model.inner = nn.Linear(2, 2)
    model.inner.forward = lambda x: (x, BY_AN_INSTANCE)
    found = {str(place): place for place in variables(model)}
    names = [name for name in globals() if name.isupper() and name not in ("ELSEWHERE", "MISSING", "UNREAD")]
    assert found.keys() == {f"{__name__}.{name}" for name in names}
    assert all(place.holder is globals() and place.key == name.split(".")[-1] for name, place in found.items())


def test_variables_around_a_method_are_found_and_functions_among_them_followed():
    kept, empty = [], None

    def recursive():
        return recursive, READ

    class Enclosed(nn.Module):
        def forward(self, x):
            nonlocal empty
            empty = x
            return kept, recursive()

    found = {str(place): place.get() for place in variables(Enclosed())}
    forward = Enclosed.forward.__qualname__
    assert found == {f"{forward}.kept": kept, f"{forward}.empty": None, f"{__name__}.READ": READ}
    assert found[f"{forward}.kept"] is kept
