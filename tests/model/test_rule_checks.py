"""Rules that have no effect are refused."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_plugin import QuantizeConfig
from gptq_plugin.errors import TargetError
from gptq_plugin.model.rule_checks import check_rules, with_deciding_rules
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import find_targets

from models import Plain, tiny_llama

NAMES = ["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj", "layers.0.down_proj", "layers.0.experts.3.w1"]


def rules(**by_pattern: Any) -> QuantizeConfig:
    return QuantizeConfig(dynamic=by_pattern["dynamic"])


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ({"nowhere": {"bits": 8}}, r"'nowhere' matches none of the 5 linear layers"),
        (
            {".*down": {"bits": 8}, r"layers\.0\.down_proj": {"bits": 3}},
            r"'layers.*no effect.*which for layers\.0\.down_proj is \.\*down\.",
        ),
        (
            {"+:.*q_proj": {"bits": 8}, "-:.*q_proj": {}},
            r"'-:\.\*q_proj' has no effect.*is \+:\.\*q_proj",
        ),
        ({".*[qk]": {"bits": 8}, ".*v": {"bits": 8}, ".*_proj": {"bits": 3}, ".*down": {"bits": 2}}, r"'\.\*down' has"),
        ({".*qkv_proj": {"bits": 8}}, "matches layers.0.qkv_proj, under which servers compute layers.0.q_proj"),
        ({r".*experts$": {"bits": 8}}, "matches layers.0.experts, under which"),
    ],
)
def test_a_rule_without_effect_is_refused_with_the_reason(dynamic: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=f"dynamic: .*{words}"):
        check_rules(rules(dynamic=dynamic), NAMES)


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ({"again": {"bits": 8}}, r"give it nothing as the one and \{'bits': 8\} \('again'\) as the other"),
        ({"-:inner": {}, "head": {"bits": 8}}, r"give it no quantization \('-:inner'\) as the one and nothing"),
    ],
)
def test_rules_for_one_of_the_names_of_a_layer_are_refused(dynamic: dict[str, Any], words: str) -> None:
    structure = Structure.of(Plain())
    with pytest.raises(TargetError, match=rf"inner\.2 and again are one layer, .*{words}.*matches both names"):
        find_targets(structure, rules(dynamic=dynamic))
    targets, _ = find_targets(structure, rules(dynamic={r"inner\.2|again": {"bits": 8}}))
    assert {target.name: target.config.bits for target in targets}["inner.2"] == 8


def test_a_layer_stays_float_by_any_of_its_names() -> None:
    _, skipped = find_targets(Structure.of(Plain()), QuantizeConfig(modules_to_not_convert=["again"]))
    assert {skip.name: skip.reason for skip in skipped}["inner.2"] == "left float by `modules_to_not_convert`"


@pytest.mark.parametrize(
    "dynamic",
    [
        {".*down": {"bits": 8}, ".*": {"bits": 3}},
        {r".*\.[qkv]_proj": {"bits": 8}, ".*qkv_proj": {"bits": 8}},  # the second one for servers
        {"-:.*experts.*w1": {}, r"-:.*experts$": {}},
    ],
)
def test_rules_that_each_decide_for_something_are_taken(dynamic: dict[str, Any]) -> None:
    check_rules(rules(dynamic=dynamic), NAMES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamic": {".*down_proj": {"bits": 8}}, "modules_to_not_convert": ("mlp",)}, "`modules_to_not_convert`"),
        ({"dynamic": {"lm_head": {"bits": 8}}}, "lm_head=false"),
    ],
)
def test_a_rule_for_layers_that_stay_float_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=f"has no effect: all layers it decides for stay float .*{words}"):
        find_targets(Structure.of(tiny_llama()), QuantizeConfig(group_size=32, **options))
    find_targets(
        Structure.of(tiny_llama()), QuantizeConfig(group_size=32, lm_head=True, dynamic={"lm_head": {"bits": 8}})
    )


def test_rules_that_others_shadow_are_left_out_where_rules_are_put_in_front() -> None:
    kept = {".*down": {"bits": 8}, ".*qkv_proj": {"bits": 8}}
    config = rules(dynamic={**kept, ".*down_proj": {"bits": 3}})
    assert with_deciding_rules(config, NAMES).dynamic == kept
