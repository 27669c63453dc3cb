"""What GPTQModel takes."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_plugin.clients.client import Client
from gptq_plugin.clients.rules import conditions, problems

from inventories import CT, DOWN8, FUSED, MIXTRAL, experts, inventory

REFUSED = [
    # the checkpoint, words of the sentence (which layer, why, what works instead)
    ({"checkpoint_format": CT}, ("not compressed-tensors", "'gptq_v2'")),
    ({"group_size": 8}, ("not 8", "group_size=128")),
    (experts(MIXTRAL), ("experts.0.w1", "gate_proj, up_proj", "load_quantized")),
    (experts(FUSED), ("gate_up_proj", "modules_to_not_convert")),
]


@pytest.mark.parametrize("what,words", REFUSED)
def test_a_limit_is_named_with_the_layer_the_reason_and_what_works(
    what: dict[str, Any], words: tuple[str, ...]
) -> None:
    found = problems(inventory(**what), Client("gptqmodel"))
    assert any(all(word in sentence for word in words) for sentence in found), found


TAKEN: list[dict[str, Any]] = [
    experts(),
    {"change": DOWN8, "lm_head": True, "sym": False, "act_order": True},
]


@pytest.mark.parametrize("what", TAKEN)
def test_what_it_takes_is_not_refused(what: dict[str, Any]) -> None:
    assert not problems(inventory(**what), Client("gptqmodel"))


def test_one_group_a_row_needs_another_kernel() -> None:
    assert "backend='torch'" in " ".join(conditions(inventory(group_size=-1), Client("gptqmodel")))
    assert not conditions(inventory(), Client("gptqmodel"))


def test_layers_left_float_without_a_rule_are_named() -> None:
    missing, left = Client("gptqmodel").rules.missing, inventory(leave=("mlp.up_proj", "mlp.down_proj"))
    (line,) = missing(left, {"dynamic": {r"-:.*\.up_proj": {}, r".*\.down_proj": {"bits": 8}}})
    assert "model.layers.0.mlp.down_proj are float" in line and "up_proj" not in line
    assert not list(missing(left, {"dynamic": {r"-:.*\.(up|down)_proj": {}}}))
