"""Which layers get one grid together, and which grids they can have."""

from __future__ import annotations

import pytest
from plans import Listed, plan_of
from torch import nn

from gptq_plugin import QuantizeConfig
from gptq_plugin.allocation.grids import Grid
from gptq_plugin.allocation.units import units_of
from gptq_plugin.clients.client import Client

from models import tiny_gpt2, tiny_llama


def units(model, client=None, **options):
    config = QuantizeConfig(**{"group_size": 32, "target_bits": 4.0, **options})
    return {unit.name: unit for unit in units_of(plan_of(model, config), client)}


@pytest.mark.parametrize("client", [None, "gptqmodel"])
def test_every_layer_is_a_unit_of_its_own_where_no_client_fuses_some(client):
    found = units(tiny_llama(num_hidden_layers=1), None if client is None else Client(client))
    assert len(found) == 7 and all(unit.names == [name] for name, unit in found.items())


@pytest.mark.parametrize("options", [{"checkpoint_format": "compressed-tensors"}, {}])
def test_layers_that_the_client_computes_as_one_are_one_unit(options):
    found = units(tiny_llama(num_hidden_layers=1), Client("vllm"), **options)
    assert {name: len(unit.targets) for name, unit in found.items()} == {
        "model.layers.0.self_attn.qkv_proj": 3,
        "model.layers.0.self_attn.o_proj": 1,
        "model.layers.0.mlp.gate_up_proj": 2,
        "model.layers.0.mlp.down_proj": 1,
    }
    assert all(len(unit.targets) == 1 for unit in units(tiny_gpt2(), Client("vllm"), **options).values())


def test_all_experts_of_a_list_are_one_unit_on_grids_that_all_can_have():
    found = units(nn.ModuleDict({"mlp": Listed(width=64)}), group_size=128)
    assert len(found["mlp.experts"].targets) == 8
    assert {grid.group_size for grid in found["mlp.experts"].grids} == {64, 32}  # 128 divides no 64 inputs


def test_groups_are_no_larger_than_asked_and_divide_the_inputs():
    model = nn.ModuleDict({"a": nn.Linear(256, 64), "b": nn.Linear(96, 64), "c": nn.Linear(40, 64)})
    sizes = {
        name: list(dict.fromkeys(grid.group_size for grid in unit.grids))
        for name, unit in units(model, group_size=128).items()
    }
    assert sizes == {"a": [128, 64, 32], "b": [32], "c": [-1]}
    assert [*dict.fromkeys(g.group_size for g in units(model, group_size=-1)["a"].grids)] == [-1, 128, 64, 32]


def test_widths_at_which_a_layer_fills_no_whole_words_are_none_of_its_grids():
    found = units(nn.ModuleDict({"a": nn.Linear(64, 48), "b": nn.Linear(64, 64)}))
    assert {grid.bits for grid in found["a"].grids} == {2, 4, 8} and len(found["b"].grids) == 4


def test_combinations_that_no_client_reads_are_none():
    found = units(tiny_llama(), sym=False, checkpoint_format="compressed-tensors")
    assert {grid.bits for unit in found.values() for grid in unit.grids} == {2, 3, 4}


@pytest.mark.parametrize(
    ("client", "options", "widths"),
    [
        ("vllm", {}, {4, 8}),
        ("vllm", {"checkpoint_format": "compressed-tensors"}, {2, 3, 4, 8}),
        ("gptqmodel", {}, {2, 3, 4, 8}),
    ],
)
def test_a_client_leaves_the_grids_that_it_reads(client, options, widths):
    found = units(tiny_llama(), Client(client), **options)
    assert {grid.bits for unit in found.values() for grid in unit.grids} == widths


def test_the_narrowest_grid_in_the_largest_groups_comes_first():
    for unit in units(tiny_llama(), group_size=64).values():
        assert unit.grids[0].bits == 2 and unit.grids[-1] == Grid(8, 32)
