"""Rules that give single layers their grids, for every reader."""

from __future__ import annotations

from plans import plan_of

from gptq_plugin import QuantizeConfig
from gptq_plugin.allocation.grids import Grid, with_grids
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import problems

from models import Plain, tiny_llama


def test_layers_that_are_fused_have_a_rule_for_the_fused_name_too_which_vllm_looks_up():
    plan = plan_of(tiny_llama(hidden_size=128, intermediate_size=128), QuantizeConfig(group_size=32))
    grids = {t.name: Grid(8 if "layers.1.self_attn" in t.name else 4, 32) for t in plan.targets}
    found = with_grids(plan, grids)
    assert found.config.rule_for("model.layers.1.self_attn.qkv_proj")[1] == {"bits": 8}
    assert problems(Inventory.of_plan(found), Client("vllm")) == []
    differing = with_grids(plan, {**grids, "model.layers.1.self_attn.q_proj": Grid(4, 32)})
    assert not differing.config.rule_for("model.layers.1.self_attn.qkv_proj")[0]


def test_layers_beside_a_float_one_have_rules_of_their_own_alone():
    float_ones = ["layers.1.self_attn.k_proj", "layers.1.mlp.up_proj"]
    plan = plan_of(tiny_llama(), QuantizeConfig(group_size=32, modules_to_not_convert=float_ones))
    grids = {t.name: Grid(8 if "layers.1." in t.name else 4, 32) for t in plan.targets}
    found = with_grids(plan, grids)
    assert {t.name: Grid.of(t.config) for t in found.targets} == grids
    assert not found.config.rule_for("model.layers.1.mlp.gate_up_proj")[0]


def test_a_layer_with_two_names_has_a_rule_for_both():
    plan = plan_of(Plain(), QuantizeConfig())
    found = with_grids(plan, {t.name: Grid(8 if t.name == "inner.2" else 4, 32) for t in plan.targets})
    assert [found.config.for_module(name).bits for name in ("inner.0", "inner.2", "again")] == [4, 8, 8]


def test_the_most_common_grid_needs_no_rules_and_rules_of_the_user_keep_what_else_they_change():
    config = QuantizeConfig(group_size=32, target_bits=3.0, dynamic={".*o_proj": {"sym": False}})
    plan = plan_of(tiny_llama(), config)
    grids = {t.name: Grid(8, 32) if "0.self_attn.o_proj" in t.name else Grid(3, 32) for t in plan.targets}
    found = with_grids(plan, grids).config
    assert (found.bits, found.group_size, found.target_bits) == (3, 32, None)
    assert len(found.dynamic) == 2
    first, second = (found.for_module(f"model.layers.{block}.self_attn.o_proj") for block in (0, 1))
    assert (first.bits, first.sym) == (8, False) and (second.bits, second.sym) == (3, False)
