"""What clients find in a checkpoint, before and after it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.export.export import export_model
from gptq_plugin.layers.qlinear import QuantLinear

from inventories import CT, half_llama, of_planned, of_quantized
from models import tiny_gpt2


@pytest.mark.parametrize(
    "options,permuted",
    [
        ({}, False),
        ({"sym": False, "checkpoint_format": "gptq_v2", "bits": 8, "group_size": -1}, False),
        ({"desc_act": True, "static_groups": False}, True),
        ({"modules_to_not_convert": ("v_proj", "layers.1.mlp.down_proj")}, False),
        ({"dynamic": {r".*down_proj": {"bits": 8, "group_size": 16, "sym": False}, "-:.*gate_proj": {}}}, False),
        ({"lm_head": True}, False),
        ({"checkpoint_format": CT, "sym": False, "dynamic": {r".*down_proj": {"bits": 3}, "-:.*gate_proj": {}}}, False),
    ],
)
def test_what_is_planned_is_what_is_exported(
    options: dict[str, Any], permuted: bool, rtn: Callable[..., Any], tmp_path: Path
) -> None:
    llama, config = half_llama(), QuantizeConfig(**{"group_size": 32, **options})
    planned = of_planned(llama, config)
    quantized = rtn(llama, config, permuted)
    assert of_quantized(quantized, config) == planned
    exported = Checkpoint.open(export_model(quantized, tmp_path / "out", config))
    assert Inventory.of(exported) == planned


def test_linear_layers_left_float_are_those_inside_the_blocks() -> None:
    config = QuantizeConfig(group_size=32, dynamic={r"-:.*layers\.0\.mlp\.up_proj": {}})
    found = of_planned(half_llama(), config)
    assert found.floats == ("model.layers.0.mlp.up_proj",)  # not lm_head
    assert len(found.layers) == 13 and not found.lm_head
    assert (found.model_type, found.dtype) == ("llama", torch.float16)


def test_rules_that_change_a_grid_are_those_that_a_description_holds() -> None:
    dynamic = {r".*down_proj": {"bits": 8}, r"-:.*up_proj": {}}
    for checkpoint_format, rules in (("gptq", {r".*down_proj": {"bits": 8}}), (CT, {})):
        config = QuantizeConfig(group_size=32, dynamic=dynamic, checkpoint_format=checkpoint_format)
        assert of_planned(half_llama(), config).rules == rules


def test_act_order_is_planned_only_where_a_layer_has_several_groups() -> None:
    config = QuantizeConfig(
        group_size=32, desc_act=True, static_groups=False, dynamic={r".*down_proj": {"group_size": -1}}
    )
    planned = {x.name.rpartition(".")[2]: x.act_order for x in of_planned(half_llama(), config).layers}
    assert planned["up_proj"] and not planned["down_proj"]


def test_a_plain_module_has_no_model_type_and_no_head(rtn: Callable[..., Any]) -> None:
    model, config = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)), QuantizeConfig(group_size=32)
    planned = of_planned(model, config)
    assert planned.model_type is None and not planned.lm_head
    assert [(x.name, x.in_features, x.out_features) for x in planned.layers] == [("0", 32, 64), ("1", 64, 32)]
    assert of_quantized(rtn(model, config), config).layers == planned.layers


def test_conv1d_layers_have_their_inputs_and_outputs_the_right_way_round(rtn: Callable[..., Any]) -> None:
    config = QuantizeConfig(group_size=32)
    planned = {x.name: (x.in_features, x.out_features) for x in of_planned(tiny_gpt2(), config).layers}
    assert planned["transformer.h.0.attn.c_attn"] == (64, 192)
    quantized = rtn(tiny_gpt2(), config)
    layers = {n: (m.in_features, m.out_features) for n, m in quantized.named_modules() if isinstance(m, QuantLinear)}
    assert planned == layers
