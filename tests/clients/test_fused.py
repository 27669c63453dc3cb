"""Layers that clients compute as one."""

from __future__ import annotations

from gptq_plugin.clients import fused

from inventories import EXPERTS, MIXTRAL, QKV8, experts, inventory

BLOCK = "model.layers.0"


def test_q_k_and_v_are_one_layer_and_gate_and_up_another() -> None:
    found = {x.name: (x.names, list(x.floats)) for x in fused.fused_sets(inventory(leave=("self_attn.k_proj",)))}
    q, k, v = (f"{BLOCK}.self_attn.{letter}_proj" for letter in "qkv")
    assert found == {
        f"{BLOCK}.self_attn.qkv_proj": ([q, v], [k]),
        f"{BLOCK}.mlp.gate_up_proj": ([f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"], []),
    }


def test_experts_of_a_block_are_one_set() -> None:
    (block,) = fused.expert_blocks(inventory(**experts(MIXTRAL, leave=MIXTRAL[:1])))
    assert block.name == f"{BLOCK}.mlp.experts"
    assert block.names == list(MIXTRAL[1:]) and block.floats == MIXTRAL[:1]
    assert not fused.expert_blocks(inventory())


def test_members_are_quantized_alike_or_not_at_all() -> None:
    assert not list(fused.fused(inventory(change=QKV8), "vllm"))
    assert not list(fused.fused(inventory(leave=("mlp.gate_proj", "mlp.up_proj")), "vllm"))
    partly, mixed = fused.fused(inventory(leave=("mlp.up_proj",), change={"self_attn.v_proj": {"sym": False}}), "vllm")
    assert "up_proj (beside model.layers.0.mlp.gate_proj) left float" in partly
    assert "v_proj" in mixed and "one width, group size and symmetry" in mixed


def test_a_rule_must_match_the_fused_layers_name_too() -> None:
    own = {r".*\.[qkv]_proj$": {"bits": 8}}
    (line,) = fused.fused_rules(inventory(change=QKV8, rules=own))
    assert "q_proj" in line and "add the same rule" in line
    assert not list(fused.fused_rules(inventory(change=QKV8, rules={r".*\.(q|k|v|qkv)_proj$": {"bits": 8}})))
    for_the_fused_only = {r".*\.qkv_proj$": {"bits": 8}}
    assert list(fused.fused_rules(inventory(rules=for_the_fused_only)))


def test_one_expert_unlike_the_others_is_named() -> None:
    (line,) = fused.expert_grids(inventory(**experts(change={"sym": False})), "they must be")
    assert (
        f"{EXPERTS[-2]} (bits=4, group_size=128, sym=True)" in line
        and f"{EXPERTS[-1]} (bits=4, group_size=128, sym=False)" in line
    )
    assert not list(fused.expert_grids(inventory(**experts()), "they must be"))
    assert not list(fused.expert_grids(inventory(**experts(leave=EXPERTS)), "they must be"))
