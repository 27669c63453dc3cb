"""`dynamic` rules of a description mean the same in any order."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.formats.dynamic_rules import rules_in_any_order
from gptq_plugin.checkpoint.formats.format import Contents, Scheme
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.export.export import export_model
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import find_targets
from gptq_plugin.options.rules import rule_regex

from exports import description, logits
from models import tiny_llama

Rtn = Callable[..., Any]
BASE = {"bits": 4, "group_size": 128, "sym": True}
BLOCK = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
LLAMA = [f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK]
MOE = [
    *(f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qk"),
    *(f"model.layers.{i}.mlp.experts.{e}.{x}_proj" for i in range(2) for e in range(2) for x in ("up", "down")),
]
RULES = [r".*", r".*down_proj", r".*self_attn", r".*layers\.0\.", r"+:.*[qk]_proj", r".*experts\.", r".*\.1\..*up_proj"]
OVERRIDES = [{"bits": 8}, {"bits": 3, "sym": False}, {"group_size": 32}, {"bits": 4}, {"clip_ratios": [0.9]}]


def as_clients_read(rules: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """GPTQModel's dynamic_get and vLLM's get_dynamic_override: None is float, else the grid."""
    for pattern, overrides in rules.items():
        if re.match(rule_regex(pattern), name):
            if pattern.startswith("-:"):
                return None
            return {key: {**BASE, **overrides}[key] for key in BASE}
    return BASE


def contents_by(config: QuantizeConfig, names: list[str], odd: Mapping[str, int], left: set[str]) -> Contents:
    """What a quantization by these rules leaves: `odd` names have another group size, `left` stay float too."""
    schemes, floats = {}, []
    for name in names:
        own = config.for_module(name)
        if own is None or name in left:
            floats.append(name)
        else:
            schemes[name] = Scheme(own.bits, odd.get(name, own.group_size), own.sym, False)
    return Contents(schemes, floats)


@st.composite
def quantizations(draw: st.DrawFn) -> tuple[Contents, QuantizeConfig]:
    names = draw(st.sampled_from([LLAMA, MOE]))
    patterns = draw(st.lists(st.sampled_from(RULES), max_size=4, unique=True))
    rules: dict[str, Any] = {}
    for pattern in patterns:
        left_float = draw(st.integers(0, 3)) == 0
        rules[f"-:{rule_regex(pattern)}" if left_float else pattern] = (
            {} if left_float else draw(st.sampled_from(OVERRIDES))
        )
    odd = draw(st.dictionaries(st.sampled_from(names), st.sampled_from([32, -1]), max_size=3))
    left = draw(st.sets(st.sampled_from(names), max_size=3))
    config = QuantizeConfig(dynamic=rules)
    return contents_by(config, names, odd, left), config


@settings(deadline=None, max_examples=150)
@given(quantizations())
def test_no_name_is_matched_by_two_rules_and_each_is_described_as_it_is(case: tuple[Contents, QuantizeConfig]) -> None:
    contents, config = case
    rules = rules_in_any_order(contents, BASE, config.dynamic)
    for name in (*contents.schemes, *contents.floats):
        assert sum(bool(re.match(rule_regex(pattern), name)) for pattern in rules) <= 1
        scheme = contents.schemes.get(name)
        wanted = None if scheme is None else {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
        for ordered in (rules, dict(sorted(rules.items())), dict(reversed(rules.items()))):
            assert as_clients_read(ordered, name) == wanted
    for block in set(contents.units().values()):  # vLLM looks a block of experts up by its name
        members = [name for name, unit in contents.units().items() if unit == block]
        assert as_clients_read(rules, block) == as_clients_read(rules, members[0])
    assert rules_in_any_order(contents, BASE, rules) == rules


def test_rules_that_decide_for_all_they_match_stay_as_the_user_wrote_them() -> None:
    dynamic = {r"+:.*down_proj": {"bits": 8, "clip_ratios": [0.9]}, r"-:.*layers\.1.*q_proj": {}}
    contents = contents_by(QuantizeConfig(dynamic=dynamic), LLAMA, {}, set())
    assert rules_in_any_order(contents, BASE, dynamic) == dynamic


def test_of_two_rules_for_one_layer_the_second_names_what_it_decides_for() -> None:
    dynamic = {r".*layers\.0\.mlp\.down": {"bits": 8}, r".*down_proj": {"bits": 3}}
    contents = contents_by(QuantizeConfig(dynamic=dynamic), LLAMA, {}, set())
    assert rules_in_any_order(contents, BASE, dynamic) == {
        r".*layers\.0\.mlp\.down": {"bits": 8},
        r"model\.layers\.1\.mlp\.down_proj$": {"bits": 3},
    }


def test_a_rule_for_a_fused_layer_is_not_lost_with_one_that_overlaps() -> None:
    dynamic = {r".*layers\.0\..*(gate|up)": {"bits": 3}, r".*layers\.\d+\.(mlp\.(gate|up)|self_attn)": {"bits": 8}}
    contents = contents_by(QuantizeConfig(dynamic=dynamic), LLAMA, {}, set())
    rules = rules_in_any_order(contents, BASE, dynamic)
    for name, bits in (("0.self_attn.qkv_proj", 8), ("1.mlp.gate_up_proj", 8), ("0.mlp.gate_up_proj", 3)):
        read = as_clients_read(rules, f"model.layers.{name}")
        assert read is not None and read["bits"] == bits
    find_targets(Structure.of(tiny_llama()), QuantizeConfig(group_size=32, dynamic=rules))  # and may be used again


OVERLAPPING = {
    "two of the user's": {r"z.*|.*layers\.0\.mlp.*": {"bits": 8}, r".*mlp\.": {"bits": 3, "group_size": 16}},
    "an exclusion last": {r"model\.layers\.1\.mlp.*": {"bits": 8}, r"-:.*down_proj": {}},
    "an exclusion first": {r"-:.*layers\.0.*[qv]_proj": {}, r"+:.*self_attn": {"sym": False}},
    "with one of the export's own": {r".*mlp": {"bits": 8, "group_size": 64}},  # 64 does not divide 96
    "a layer left float by name": {r".*mlp": {"bits": 8}},
}


@pytest.fixture(params=OVERLAPPING)
def exported(request: pytest.FixtureRequest, rtn: Rtn, tmp_path: Path) -> Any:
    """A quantized model, its configuration and its export."""
    left = ("layers.1.mlp.up_proj",) if "by name" in request.param else ()
    config = QuantizeConfig(
        group_size=32, dynamic=OVERLAPPING[request.param], checkpoint_format="gptq_v2", modules_to_not_convert=left
    )
    model = rtn(tiny_llama(), config)
    return model, config, export_model(model, tmp_path / "out", config)


def test_every_order_of_the_exported_rules_gives_the_same_layers(exported: Any) -> None:
    model, _, folder = exported
    described, wanted = description(folder), Checkpoint.open(folder).layers
    assert len(described["dynamic"]) > 1
    whole = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").unlink()
    orders = list(itertools.islice(itertools.permutations(described["dynamic"].items()), 24))
    for order in orders:
        whole["quantization_config"] = {**described, "dynamic": dict(order)}
        (folder / "config.json").write_text(json.dumps(whole))
        assert Checkpoint.open(folder).layers == wanted
    assert torch.equal(logits(load_quantized(folder)), logits(model))


def test_a_loaded_model_survives_save_pretrained_which_sorts_the_rules(exported: Any, tmp_path: Path) -> None:
    model, _, folder = exported
    loaded = load_quantized(folder)
    loaded.save_pretrained(tmp_path / "again")
    assert list(description(tmp_path / "again")["dynamic"]) == sorted(description(folder)["dynamic"])
    assert torch.equal(logits(load_quantized(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("dynamic", OVERLAPPING.values(), ids=OVERLAPPING)
def test_a_model_that_was_just_quantized_survives_save_pretrained(dynamic: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama()
    QuantizeModule(group_size=32, dynamic=dynamic).round_to_nearest(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load_quantized(tmp_path / "out")), logits(model))


def test_another_tools_overlapping_rules_are_put_right_when_its_checkpoint_is_loaded(
    exported: Any, tmp_path: Path
) -> None:
    model, config, folder = exported
    whole = json.loads((folder / "config.json").read_text())
    whole["quantization_config"]["dynamic"] = {
        **{
            pattern: rule
            for pattern, rule in whole["quantization_config"]["dynamic"].items()
            if pattern.startswith("-:")
        },
        **{pattern: {**rule, "act_group_aware": True} for pattern, rule in exact_first(model, config).items()},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "quantize_config.json").unlink()
    load_quantized(folder).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_quantized(tmp_path / "again")), logits(model))


def exact_first(model: Any, config: QuantizeConfig) -> dict[str, Any]:
    """Exact rules, then one that contradicts them all and is sorted before them."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    rules: dict[str, Any] = {}
    for name, layer in layers.items():
        own = config.for_module(name)
        assert own is not None
        rules[f"{re.escape(name)}$"] = {"bits": layer.bits, "group_size": layer.group_size, "sym": own.sym}
    return {**rules, ".*": {"bits": 2, "group_size": 8}}


def test_config_groups_may_be_read_in_any_order(rtn: Rtn, tmp_path: Path) -> None:
    dynamic = {r".*layers\.0\.mlp\.down": {"bits": 8}, r".*down_proj": {"group_size": 16}, "-:.*o_proj": {}}
    config = QuantizeConfig(group_size=32, dynamic=dynamic, checkpoint_format="compressed-tensors")
    folder = export_model(rtn(tiny_llama(), config), tmp_path / "out", config)
    wanted, whole = Checkpoint.open(folder).layers, json.loads((folder / "config.json").read_text())
    groups = whole["quantization_config"]["config_groups"]
    assert len(groups) == 3
    for order in itertools.permutations(groups.items()):
        whole["quantization_config"]["config_groups"] = dict(order)
        (folder / "config.json").write_text(json.dumps(whole))
        assert Checkpoint.open(folder).layers == wanted


def test_only_formats_with_rules_have_them() -> None:
    contents = Contents({"a": Scheme(8, 128, True, False), "b": Scheme(4, 128, True, False)}, [])
    assert {name for name, form in FORMATS.items() if "dynamic" in form.describe(contents, QuantizeConfig())} == {
        name for name, form in FORMATS.items() if form.has_rules
    }
