"""Units: which tensors of a model come and go together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.errors import TargetError
from gptq_plugin.memory.units import divide

from models import Plain, tiny_llama
from module_tensors import size


def units(model, unit_bytes):
    """By module name, the names of the units it needs; and by unit name, the names of its tensors."""
    names = {module: name for name, module in model.named_modules()}
    needs = divide(model, unit_bytes)
    tensors = {unit.name: [one.slot.name for one in unit.tensors] for found in needs.values() for unit in found}
    return {names[module]: [unit.name for unit in found] for module, found in needs.items()}, tensors


def test_transformer_blocks_are_found_by_their_size_and_what_is_larger_comes_in_parts():
    model = tiny_llama()
    needs, tensors = units(model, size(model.model.layers[0]))
    assert list(tensors) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm",
                             "model.rotary_emb", "lm_head"]  # fmt: skip
    assert needs["model.layers.1"] == needs["model.layers.1.mlp.up_proj"] == ["model.layers.1"]
    assert "model.layers" not in needs and "" not in needs  # they hold nothing, and nothing around them does
    names = [name for unit in tensors.values() for name in unit]
    assert sorted(names) == sorted(dict([*model.named_parameters(), *model.named_buffers()]))


def test_one_byte_less_and_a_block_comes_in_parts():
    model = tiny_llama()
    _, tensors = units(model, size(model.model.layers[0]) - 1)
    assert "model.layers.0" not in tensors and "model.layers.0.mlp" in tensors


def test_a_part_needs_what_the_modules_around_it_hold_the_outermost_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model.register_parameter("outer", nn.Parameter(torch.ones(2)))
    model[1].lists = nn.ParameterList([nn.Parameter(torch.ones(3))])
    needs, tensors = units(model, 0)
    assert needs["1.0"] == ["Sequential", "1", "1.0"] and needs["1.1"] == ["Sequential", "1"]  # 1.1 holds nothing
    assert tensors["1"] == ["1.lists.0"] and tensors["Sequential"] == ["outer"]  # a list is part of what holds it


def test_a_module_of_several_places_belongs_to_the_unit_of_the_first():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    model[1].append(model[0][1])
    needs, tensors = units(model, size(model[0]))
    assert needs["0.1"] == ["0", "1"] and needs["1"] == ["1", "0"] and needs["1.0"] == ["1", "0"]
    assert tensors == {"0": ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"], "1": ["1.0.weight", "1.0.bias"]}


def test_tied_and_shared_tensors_are_weighed_once():
    model = Plain()
    _, tensors = units(model, size(model))
    assert list(tensors) == ["Plain"]


def test_weights_without_values_are_refused_by_name():
    model = tiny_llama()
    model.model.layers[1].to("meta")
    message = r"model.layers.1.self_attn.q_proj.weight, .* 5 more .*of LlamaForCausalLM .*load the weights first"
    with pytest.raises(TargetError, match=message):
        divide(model, 0)
