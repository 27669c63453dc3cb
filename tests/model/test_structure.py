"""What a model consists of, found in one pass."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.model.structure import Structure

from models import Plain, tiny_llama


def mixtral():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_layers_have_their_shapes_and_the_head_its_name():
    structure = Structure.of(tiny_llama(num_hidden_layers=1, tie_word_embeddings=False))
    assert structure.linears["lm_head"] is structure.head and structure.published_head == "lm_head"
    assert structure.shapes["model.layers.0.mlp.down_proj"] == (64, 96) and structure.shapes["lm_head"] == (128, 64)
    assert (structure.routers, structure.obstacles, structure.outside) == ({}, {}, set())
    assert len(structure.linears) == 8 and set(structure.shapes) == set(structure.linears)


def test_a_shared_layer_is_one_layer_with_two_names_and_a_tied_one_an_obstacle_unless_it_is_the_head():
    model = Plain()
    structure = Structure.of(model)
    assert list(structure.linears) == ["inner.0", "inner.2", "head"]
    assert structure.shapes["again"] == structure.shapes["inner.2"] == (48, 96)
    assert structure.head is model.head and structure.published_head is None  # no transformers model
    assert structure.obstacles == {}
    other = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "whole": nn.Linear(4, 4)})
    other["b"].weight = other["a"].weight
    other["whole"].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)
    reasons = Structure.of(other).obstacles
    assert reasons[other["a"]] == "its weight is tied to b.weight" and reasons[other["b"]].endswith("a.weight")
    assert "int32, not floating point" in reasons[other["whole"]]


def test_experts_are_layers_while_they_are_apart_and_keep_their_names_in_the_checkpoint():
    model = mixtral()
    fused = Structure.of(model)
    structure = Structure.of_unfused(model)
    assert len(structure.linears) - len(fused.linears) == 9
    assert list(structure.routers) == ["model.layers.0.mlp.gate"] and fused.routers == {}
    assert structure.shapes["model.layers.0.mlp.gate"] == (3, 32)
    assert structure.stored_names is structure.stored_names  # asked for once
    assert structure.stored_names["model.layers.0.self_attn.q_proj"] == "model.layers.0.self_attn.q_proj"
    assert sum("block_sparse_moe" in name for name in structure.stored_names.values()) >= 9


def test_quantized_layers_count_as_layers_of_their_shape():
    model = tiny_llama(num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    from gptq_plugin import QuantizeConfig

    weight = round_to_nearest(layer.weight.detach(), QuantizeConfig(group_size=32))
    before = Structure.of(model)
    swap_modules(model, {name: QuantLinear.from_quantized(weight, None)})
    after = Structure.of(model)
    assert after.shapes == before.shapes and isinstance(after.linears[name], QuantLinear)
