"""Slots: where modules hold tensors, and what stands there for a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.memory.slots import Substitution, all_slots, distinct_tensors, like, own_slots

from models import Plain


def slot(module, key):
    return next(one for one in own_slots(module) if one.key == key)


def test_every_parameter_and_buffer_has_a_slot_under_the_name_of_the_state_dict():
    model = Plain()
    model.inner[0].register_buffer("empty", None)
    slots = list(all_slots(model))
    # `again` is a module that has a name already; the tied weight has a slot in each of two modules.
    assert {one.name for one in slots} == {name for name in model.state_dict() if not name.startswith("again")}
    assert all(one.tensor is model.get_submodule(one.name.rpartition(".")[0])._parameters.get(one.key, model.shift)
               for one in slots)  # fmt: skip
    assert [one.name for one in own_slots(model.inner[0], "inner.0")] == ["inner.0.weight", "inner.0.bias"]


def test_distinct_tensors_are_counted_once_however_often_they_are_used():
    model = Plain()
    expected = [model.embed.weight, model.shift, model.window, *model.inner.parameters()]
    found = distinct_tensors(model)
    assert len(found) == len(expected) and all(any(one is other for other in found) for one in expected)


def test_a_parameter_is_replaced_by_a_parameter_and_a_buffer_by_a_tensor():
    parameter, buffer, value = nn.Parameter(torch.ones(2)), torch.ones(2), torch.zeros(2)
    assert type(like(parameter, value)) is nn.Parameter and not like(parameter, value).requires_grad
    assert like(parameter, value).data_ptr() == value.data_ptr() and like(buffer, value) is value


def test_recurrent_layers_compute_with_the_tensor_put_into_their_slot():
    lstm, x = nn.LSTM(4, 4), torch.ones(3, 1, 4)
    plain = lstm(x)[0]
    weight = Substitution(slot(lstm, "weight_ih_l0"))
    weight.put(nn.Parameter(torch.zeros_like(weight.home)))
    assert not torch.equal(lstm(x)[0], plain)
    weight.undo()
    assert lstm.weight_ih_l0 is weight.home and torch.equal(lstm(x)[0], plain)


def test_undoing_brings_the_own_tensor_back_once():
    layer = nn.Linear(2, 2)
    weight = Substitution(slot(layer, "weight"))
    given = nn.Parameter(torch.zeros(2, 2))
    for _ in range(2):
        weight.put(given)
        assert layer.weight is given and weight.slot.tensor is given and not weight.is_of_forward
        weight.undo()
        assert layer.weight is weight.home and not weight.is_of_forward
    weight.undo()
    assert layer.weight is weight.home


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(2))


@pytest.mark.parametrize("change", ["assigned", "written", "none", "deleted"])
def test_what_the_forward_does_to_a_buffer_is_not_undone(change):
    module = Holder()
    state, home = Substitution(slot(module, "state")), module.state
    state.put(torch.ones(2))
    if change == "assigned":
        module.state = torch.full((2,), 3.0)
    elif change == "written":
        module.state.add_(2)
    elif change == "none":
        module.state = None
    else:
        del module.state
    now = getattr(module, "state", None)
    state.undo()
    assert getattr(module, "state", None) is now is not home
    assert state.is_of_forward  # so no other tensor takes its place
    state.move_to_home_device()
    assert getattr(module, "state", None) is now  # it is there already, or nowhere


def test_a_tensor_the_forward_assigned_elsewhere_comes_to_the_device_of_the_own_one():
    module = Holder().to("meta")  # in place of a CPU; the CPU in place of a GPU
    state = Substitution(slot(module, "state"))
    state.put(torch.zeros(2))
    module.state = torch.ones(2)
    state.undo()
    assert not module.state.is_meta
    state.move_to_home_device()
    assert module.state.is_meta
