"""What forwards keep outside their local variables is exchanged when another batch runs."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections import deque

import pytest
import torch
from torch import nn

from gptq_plugin.walk import lockstep
from gptq_plugin.walk.batch_thread import BatchThread
from gptq_plugin.walk.groups import find_groups
from gptq_plugin.walk.kept_state import KeptState, NotCopied, Values

from models import tiny_llama
from walks import linears, walk


class Block(nn.Module):
    """Reads what the outer forward left for it, by any of the ways below."""

    shared = None

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


class Attribute(Block):
    def keep(self, value):
        self.condition = value

    def kept(self):
        return self.condition


class OnALayer(Block):
    def keep(self, value):
        self.second.condition = value

    def kept(self):
        return self.second.condition


class Buffer(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("condition", torch.zeros(8))

    def keep(self, value):
        self.condition = value

    def kept(self):
        return self.condition


class BufferInPlace(Buffer):
    def keep(self, value):
        self.condition.copy_(value)


class TensorInPlace(BufferInPlace):
    def __init__(self):
        Block.__init__(self)
        self.condition = torch.zeros(8)


class InAList(Block):
    def __init__(self):
        super().__init__()
        self.memory = []

    def keep(self, value):
        self.memory.append(value)

    def kept(self):
        return torch.stack(list(self.memory)).sum(0)


class InADeque(InAList):
    def __init__(self):
        super().__init__()
        self.memory = deque(maxlen=2)


class InNestedDicts(Block):
    def __init__(self):
        super().__init__()
        self.cache = {"layers": {0: [None]}}

    def keep(self, value):
        self.cache["layers"][0][0] = value

    def kept(self):
        return self.cache["layers"][0][0]


@dataclasses.dataclass
class Context:
    value: torch.Tensor | None = None


class Slotted:
    __slots__ = ("value",)


class OnAnObject(Block):
    make = Context

    def __init__(self):
        super().__init__()
        self.context = self.make()
        self.second.context = self.context  # one object for all layers

    def keep(self, value):
        self.context.value = value

    def kept(self):
        return self.second.context.value


class OnAnEmptyObject(OnAnObject):
    make = types.SimpleNamespace


class OnASlottedObject(OnAnObject):
    make = Slotted


class OnTheClass(Block):
    def keep(self, value):
        type(self).shared = value

    def kept(self):
        return type(self).shared


GLOBAL = None
GLOBALS = {}


class InAGlobal(Block):
    def keep(self, value):
        global GLOBAL
        GLOBAL = value

    def kept(self):
        return GLOBAL


def _remember(value):
    GLOBALS["condition"] = value


class InAGlobalDictOfAFunction(Block):
    def keep(self, value):
        _remember(value)

    def kept(self):
        return GLOBALS["condition"]


def closure():
    condition = None

    class InAClosure(Block):
        def keep(self, value):
            nonlocal condition
            condition = value

        def kept(self):
            return condition

    return InAClosure()


class AsASubmodule(Block):
    def keep(self, value):
        self.condition = nn.ParameterList([nn.Parameter(value)])

    def kept(self):
        return self.condition[0]


class Deleted(Attribute):
    def kept(self):
        value = self.condition
        del self.condition
        return value


WAYS = [
    Attribute,
    OnALayer,
    Buffer,
    BufferInPlace,
    TensorInPlace,
    InAList,
    InADeque,
    InNestedDicts,
    OnAnObject,
    OnAnEmptyObject,
    OnASlottedObject,
    OnTheClass,
    InAGlobal,
    InAGlobalDictOfAFunction,
    closure,
    AsASubmodule,
    Deleted,
]


class Outer(nn.Module):
    """Conditions its block from outside."""

    def __init__(self, block):
        super().__init__()
        self.block, self.last = block, nn.Linear(8, 8)

    def forward(self, x, condition):
        self.block.keep(condition)
        y = self.block.first(x)
        return self.last(self.block.second(y + self.block.kept()))


class Told(nn.Module):
    """The same function with the condition as an argument."""

    def __init__(self, outer):
        super().__init__()
        self.outer = outer

    def forward(self, x, condition):
        y = self.outer.block.first(x)
        return self.outer.last(self.outer.block.second(y + condition))


def _data(count=3):
    torch.manual_seed(0)
    return [(torch.randn(5, 8), torch.randn(8)) for _ in range(count)]


@pytest.mark.parametrize("way", WAYS)
def test_every_batch_reads_what_its_own_forward_kept(way):
    torch.manual_seed(1)
    model = Outer(way())
    told = Told(model)
    data = _data()
    outputs, _, counted = walk(model, [lambda one=one: model(*one) for one in data])
    expected, _, rightly = walk(told, [lambda one=one: told(*one) for one in data])
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
    for (name, inputs), right in zip(counted.items(), rightly.values()):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(inputs, right)), name


@pytest.mark.parametrize("way", WAYS)
def test_a_walk_leaves_the_model_as_it_was(way):
    block = way()
    model = Outer(block)
    before = KeptState(model)
    walk(model, [lambda one=one: model(*one) for one in _data()])
    for place, held in before.look().items():  # the version of a tensor grows when its values are put back
        assert place.get() is held and not held.any()


def test_without_the_exchange_the_last_batch_is_read_by_all():
    model, data = Outer(Attribute()), _data()
    told = Told(model)
    outputs = {}
    layers = linears(model)
    groups = find_groups(layers, lambda: model(*data[0]))
    forwards = [lambda i=i: outputs.setdefault(i, model(*data[i])) for i in range(3)]
    for _ in lockstep.walk(groups, layers, forwards, lambda *_: None):
        pass
    with torch.no_grad():
        assert not torch.equal(outputs[0], told(*data[0])) and torch.equal(outputs[2], told(*data[2]))


def test_a_place_that_only_a_later_batch_writes_to_is_exchanged_too():
    class Sometimes(Attribute):
        def __init__(self):
            super().__init__()
            self.condition = torch.zeros(8)

        def keep(self, value):
            if value.sum() > 0:
                super().keep(value)

    torch.manual_seed(2)
    model = Outer(Sometimes())
    data = [(torch.randn(5, 8), torch.full((8,), sign)) for sign in (-1.0, 1.0, -2.0, 2.0)]
    outputs, _, _ = walk(model, [lambda one=one: model(*one) for one in data])
    told = Told(model)
    with torch.no_grad():
        expected = [told(x, condition.clamp(min=0)) for x, condition in data]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))


def test_weights_that_the_first_forward_rescales_are_rescaled_once():
    class Rescaling(nn.Module):  # as RWKV does in evaluation
        def __init__(self):
            super().__init__()
            self.layer, self.rescaled = nn.Linear(8, 8), False

        @torch.no_grad()
        def forward(self, x):
            if not self.rescaled:
                self.layer.weight.div_(2)
                self.rescaled = True
            return self.layer(x)

    model = Rescaling()
    half = model.layer.weight.detach() / 2
    walk(model, [lambda: model(torch.ones(3, 8))] * 3)
    assert torch.equal(model.layer.weight, half) and model.rescaled


@pytest.mark.parametrize("ran_before", [False, True])
def test_hooks_that_the_first_forward_registers_are_registered_once(ran_before):
    class Hooked(nn.Module):  # as transformers' models do where hidden states are asked for
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            if not getattr(self, "hooked", False):
                self.layer.register_forward_hook(lambda _, args, out: self.seen.append(out))
                self.hooked = True
            self.seen = []
            self.layer(x)
            (out,) = self.seen
            return out

    model = Hooked()
    if ran_before:
        BatchThread(0, lambda: model(torch.ones(3, 8)), kept=Values(KeptState(model), alone=True)).resume()
    outputs, _, _ = walk(model, [lambda n=n: model(torch.full((3, 8), float(n))) for n in range(3)])
    assert model.hooked and len(model.layer._forward_hooks) == 1
    with torch.no_grad():
        assert all(torch.equal(out, model(torch.full((3, 8), float(n)))) for n, out in enumerate(outputs))


def test_values_that_share_an_object_share_it_in_every_batch():
    model = Outer(OnAnObject())
    state = KeptState(model)
    model.block.keep(torch.ones(8))
    state.end_first()
    values = Values(state)
    values.put()
    assert model.block.context is model.block.second.context
    own = model.block.context
    values.take(at_end=False)
    assert model.block.context is not own and model.block.context.value is None


def test_copies_of_what_is_kept_share_modules_and_weights_with_the_model():
    model = Outer(Attribute())
    state = KeptState(model)
    model.block.condition = {"layer": [model.last], "weight": (model.last.weight,)}
    state.look()
    (copied,) = state.copies({place: place.get() for place in state.initial}).values()
    assert copied is not model.block.condition
    assert copied["layer"][0] is model.last and copied["weight"][0] is model.last.weight


def test_what_cannot_be_copied_is_named():
    model = Outer(Attribute())
    model.block.condition = (x for x in "ab")
    state = KeptState(model)
    state.look()
    model.block.condition = None
    state.end_first()
    with pytest.raises(NotCopied, match=r"block\.condition"):
        Values(state).put()


def test_a_batch_that_runs_alone_begins_with_what_cannot_be_copied_and_copies_of_all_else():
    model = Outer(Attribute())
    letters, numbers = (x for x in "ab"), [1]
    model.block.condition, model.block.numbers = letters, numbers
    state = KeptState(model)
    model.block.condition = model.block.numbers = None
    state.end_first()
    own = Values(state, alone=True)
    own.put()
    assert model.block.condition is letters and model.block.numbers == [1] and model.block.numbers is not numbers
    model.block.numbers.append(2)
    model.block.condition = digits = (x for x in "12")
    own.take(at_end=False)
    assert model.block.condition is letters and model.block.numbers == [1]
    own.put()
    assert model.block.condition is digits and model.block.numbers == [1, 2]
    own.take(at_end=True)
    assert model.block.numbers is numbers == [1]


def test_what_is_replaced_for_a_batch_is_no_writing_of_its_own():
    model = Outer(Attribute())
    state = KeptState(model)
    own, other = Values(state, alone=True, looks=False), nn.Linear(8, 8)
    own.put()
    model.last = other
    own.take(at_end=True)
    assert model.last is other and state.initial == {}


def test_an_object_that_holds_the_model_is_not_looked_into():
    model = Outer(Attribute())
    trainer = types.SimpleNamespace(model=model, step=0)
    model.block.trainer = trainer
    state = KeptState(model)
    trainer.step = 1
    assert state.look() == {}


def test_a_transformers_model_keeps_nothing():
    model, ids = tiny_llama(), torch.arange(12)[None]
    state = KeptState(model)
    with torch.no_grad():
        model(input_ids=ids)
    assert state.look() == {}


def _flagged(register):
    """A model whose first forward registers a hook and sets a flag; it has had a hook of its user's before."""

    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last, self.flag, self.kept = nn.Linear(8, 8), nn.Linear(8, 8), False, None

        def forward(self, x):
            if not self.flag:
                register(self.layer)
                self.flag = True
            self.kept = x
            return self.last(self.layer(x))

    model = Flagged()
    model.last.register_forward_hook(lambda *_: None)
    return model


def _ours(layer):
    hook = lambda *_: None  # noqa: E731
    hook.__module__ = "gptq_plugin.walk.layer_inputs"
    layer.register_forward_hook(hook)


def _theirs(layer):
    layer.register_forward_hook((lambda *_: None).__call__)  # which has no __module__


@pytest.mark.parametrize("register, stays", [(_ours, False), (_theirs, True), (lambda layer: None, False)])
def test_a_flag_stays_where_a_hook_of_others_was_registered_with_it(register, stays):
    model = _flagged(register)
    state = KeptState(model)
    find_groups(linears(model), lambda: model(torch.ones(3, 8)), state=state)
    assert {str(place): value for place, value in state.initial.items()} == {".flag": stays, ".kept": None}
    state.put_back()
    assert model.flag is stays and model.kept is None


def test_buffers_of_a_batch_are_where_they_are_asked_to_be():
    model = Outer(Buffer())
    model.block.register_buffer("empty", None)
    model.block.attribute = None
    state = KeptState(model, device=torch.device("meta"))
    model.block.condition, model.block.empty, model.block.attribute = torch.ones(8), torch.ones(8), torch.ones(8)
    state.look()
    copied = state.copies({place: place.get() for place in state.initial})
    devices = {str(place): value.device.type for place, value in copied.items()}
    assert devices == {"block.condition": "meta", "block.empty": "meta", "block.attribute": "cpu"}
    assert list(state.copies(dict.fromkeys(state.initial)).values()) == [None] * 3


def test_what_others_put_in_the_place_of_a_buffer_is_not_exchanged_even_after_weights_have_changed():
    model, lent = Outer(Buffer()), []
    state = KeptState(model, is_lent=lambda value: any(value is one for one in lent))
    with torch.no_grad():
        model.last.weight.mul_(2)
    state.end_first()
    lent.append(torch.ones(8))
    model.block.condition = lent[0]
    assert state.look() == {}
    model.block.condition = torch.ones(8)
    assert [str(place) for place in state.look()] == ["block.condition"]


def test_what_a_batch_finds_itself_is_undone_for_the_others_and_what_it_kept_before_stays_its_own():
    model = Outer(InAList())
    model.block.condition = 0
    state = KeptState(model)
    model.block.condition = 1
    state.end_first()
    values, memory = Values(state), model.block.memory
    values.put()
    model.block.condition = 2
    memory.append("own")
    values.take(at_end=False)
    assert model.block.condition == 0 and model.block.memory is memory and memory == []
    values.put()
    assert model.block.condition == 2 and model.block.memory == ["own"] and memory == []
    values.take(at_end=True)
    assert model.block.condition == 0 and model.block.memory is memory


def test_a_place_that_became_known_later_leaves_a_batch_what_it_has():
    model = Outer(InAList())
    model.block.condition = model.block.other = 0
    state = KeptState(model)
    model.block.condition = 1
    state.end_first()
    values = Values(state)
    values.put()
    model.block.condition = 2
    values.take(at_end=False)
    model.block.other = 1
    state.end_first()
    values.put()
    assert (model.block.condition, model.block.other) == (2, 0)


def test_places_are_looked_at_in_the_first_two_stops_and_at_the_end():
    looks = []
    state = types.SimpleNamespace(initial={}, look=lambda: looks.append(1) or {}, put_back=lambda: None)
    values, counts = Values(state), []
    for at_end in (False, False, False, False, True):
        values.take(at_end=at_end)
        counts.append(len(looks))
    assert counts == [1, 2, 2, 2, 3]


def test_a_batch_that_has_ended_holds_nothing():
    model = Outer(Attribute())
    state = KeptState(model)
    model.block.condition = None
    state.end_first()
    values = Values(state)
    values.put()
    model.block.condition = torch.ones(8)
    kept = weakref.ref(model.block.condition)
    values.take(at_end=True)
    assert kept() is None
