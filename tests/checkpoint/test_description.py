"""The description of a model in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.checkpoint.description import client_config, describe, most_and_others, schemes_of
from gptq_plugin.checkpoint.formats.format import Contents, Scheme
from gptq_plugin.gptq.solver import round_to_nearest
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.structure import Structure

from models import tiny_llama, tiny_llava


def described(model: Any, config: QuantizeConfig) -> dict[str, Any]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return client_config(Structure.of_unfused(model), layers, config)


def test_layers_have_the_models_name_and_the_published_one(rtn: Callable[..., Any]) -> None:
    config = QuantizeConfig(group_size=32, checkpoint_format="compressed-tensors", dynamic={"-:.*v_proj": {}})
    ignored = described(rtn(tiny_llava(), config), config)["ignore"]
    for prefix in ("model.language_model.layers", "language_model.model.layers"):
        assert f"{prefix}.0.self_attn.v_proj" in ignored
        assert f"{prefix}.0.self_attn.q_proj" not in ignored


def test_the_head_is_described_where_it_is_quantized_and_left_out_where_not(rtn: Callable[..., Any]) -> None:
    for lm_head in (True, False):
        config = QuantizeConfig(group_size=32, lm_head=lm_head)
        found = described(rtn(tiny_llama(), config), config)
        assert found["lm_head"] is lm_head and "dynamic" not in found  # no rule leaves it float


def test_desc_act_is_that_of_the_groups_and_not_of_the_configuration() -> None:
    torch.manual_seed(0)
    config = QuantizeConfig(group_size=32, desc_act=True, static_groups=True, dynamic={"asym": {"sym": False}})
    layer = QuantLinear.from_quantized(round_to_nearest(torch.randn(8, 64), config))
    assert schemes_of({"x": layer}, config)["x"] == Scheme(4, 32, True, False)
    assert schemes_of({"asym": layer}, config)["asym"].sym is False
    layer.g_idx = layer.g_idx.flip(0)
    other = QuantLinear(layer.in_features, layer.out_features, layer.bits, layer.group_size)
    found = schemes_of({"other": other, "x": layer}, config)
    assert list(found) == ["other", "x"] and [one.desc_act for one in found.values()] == [False, True]


def test_what_most_layers_have_is_the_configuration_and_the_others_have_rules() -> None:
    four, eight = {"bits": 4, "sym": True}, {"bits": 8, "sym": True}
    most, rules = most_and_others({"a.b": four, "c": eight, "a.d": four})
    assert most == four and rules == {"c$": eight}
    most, rules = most_and_others({"a.b": eight})
    assert most == eight and not rules


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_a_description_names_its_maker(checkpoint_format: str) -> None:
    config = QuantizeConfig(checkpoint_format=checkpoint_format)
    found = describe(Contents({"a": Scheme(4, 128, True, False)}, []), config)
    assert [maker.partition(":")[0] for maker in found["meta"]["quantizer"]] == ["gptq_plugin"]
    assert found.get("checkpoint_format", found["quant_method"]) == checkpoint_format
