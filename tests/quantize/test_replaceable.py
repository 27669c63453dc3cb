"""What forwards of all ranks show of a plan's layers decides which of them stay float."""

from __future__ import annotations

import pytest
import torch
from plans import Attention, plan_of, rows
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.errors import TargetError
from gptq_plugin.quantize.replaceable import Replaceable


class Read(Attention):
    def forward(self, x):
        return super().forward(x) + x @ self.v.weight


def run(replaceable, model):
    with torch.no_grad():
        replaceable.watched(lambda: model(rows(4, 32)))()


def test_a_layer_stays_float_if_one_rank_saw_that_it_must_and_is_tried_out_if_none_reached_it(monkeypatch):
    model, tried = Read(), []
    replaceable = Replaceable(plan_of(model))
    run(replaceable, model)
    assert replaceable.left_float() == {"v": "the model reads its weight by itself"}
    theirs = ({"q": "another rank saw that"}, {"q", "o"})
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, theirs])
    assert replaceable.settle(lambda target: tried.append(target.name)) == {**replaceable.left_float(), **theirs[0]}
    assert tried == []
    other = Replaceable(plan_of(model))
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, theirs])
    assert other.settle(lambda target: tried.append(target.name)) == theirs[0]
    assert sorted(tried) == ["k", "v"]


def test_a_first_call_in_the_walk_is_judged_only_of_layers_that_no_rank_reached():
    model = Attention()
    replaceable = Replaceable(plan_of(model))
    own = model.k.forward
    model.k.forward = lambda x: own(x) * (2 if len(x) == 4 else 1)  # trials have eight rows
    assert replaceable.settle(lambda target: None) == {}
    with replaceable.judging_first_calls(), pytest.raises(TargetError, match="k is called by this batch for the first"):
        model(rows(4, 32))
    with replaceable.judging_first_calls():
        model(rows(8, 32))
        model(rows(4, 32))  # not the first
    assert not any(module._forward_hooks for module in model.modules())


def test_only_layers_that_are_replaced_lose_a_forward_of_their_own():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    for layer in model[:2]:
        layer.forward = layer.forward
    replaceable = Replaceable(plan_of(model))
    (sentence,) = replaceable.replaced_forwards({"1"})
    assert sentence.startswith("the forward that is set on 0 computes x·Wᵀ + b")
    assert replaceable.replaced_forwards({"0", "1"}) == []
