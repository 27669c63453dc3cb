"""QuantizeConfig: it validates itself and survives every file it is written to."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re

import pytest

from gptq_plugin import Finish, GPTQCallback, GPTQTrainerCallback, QuantizeConfig, QuantizeModule
from gptq_plugin.config import MODULE_FIELDS, own_config
from gptq_plugin.options.fields import is_number
from gptq_plugin.options.methods import METHOD_FIELDS, METHODS

UNUSUAL = QuantizeConfig(
    bits=3,
    group_size=-1,
    sym=False,
    desc_act=True,
    static_groups=False,
    damp_percent=0.05,
    damp_auto_increment=0.0,
    clip_ratios=(1.0, 0.8),
    lm_head=True,
    dynamic={r"model\.layers\.0\..*": {"bits": 8, "group_size": 32}, r"-:.*router": {}},
    modules_to_not_convert=("classifier", "mlp.gate"),
    model_seqlen=512,
    nsamples=7,
    batch_size=2,
    seed=3,
    token_weighting="labels",
    checkpoint_format="gptq_v2",
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 5, "bits must be one of 2, 3, 4, 8; got 5"),
        ("bits", True, "bits"),
        ("bits", "4", "bits"),
        ("group_size", 0, "group_size must be -1 or a positive integer"),
        ("group_size", -2, "group_size"),
        ("group_size", 64.0, "group_size"),
        ("group_size", True, "group_size"),
        ("seed", False, "seed"),
        ("damp_percent", True, "damp_percent"),
        ("sym", 1, "sym must be one of True, False"),
        ("damp_percent", 1.0, r"damp_percent must be a number in \[0, 1\)"),
        ("damp_percent", -0.1, "damp_percent"),
        ("damp_auto_increment", 2, "damp_auto_increment"),
        ("clip_ratios", (), "clip_ratios"),
        ("clip_ratios", (1.5,), "clip_ratios"),
        ("method", "worst", "method must be one of 'gptq', 'best'"),
        ("method", ["best"], "method must be one of 'gptq', 'best'"),
        ("clip_candidates", 0, "clip_candidates must be an integer from 1 to 100"),
        ("scale_rounds", -1, "scale_rounds must be an integer from 0 to 100"),
        ("refit_rounds", True, "refit_rounds must be an integer from 0 to 100"),
        ("nsamples", 0, "nsamples must be a positive integer"),
        ("model_seqlen", "512", "model_seqlen"),
        ("batch_size", 0, "batch_size"),
        ("seed", 0.5, "seed"),
        ("token_weighting", "label", "token_weighting must be one of 'all', 'labels'"),
        ("checkpoint_format", "gptq_p", "checkpoint_format must be one of 'gptq', 'gptq_v2', 'compressed-tensors'"),
        ("dynamic", {"(": {"bits": 8}}, "not a regular expression"),
        ("dynamic", {"-:x": {"bits": 8}}, "takes no overrides"),
        ("dynamic", {"x": {}}, "To leave modules float, write '-:x'"),
        ("dynamic", {"x": {"bitz": 8}}, "must override some of bits"),
        ("dynamic", {"x": {"bits": 5}}, r"dynamic\['x'\]: bits must be one of"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(**{field: value})


def test_an_unknown_option_is_refused_with_the_nearest_that_exists():
    with pytest.raises(ValueError, match="unknown option 'group_sise': did you mean 'group_size'"):
        QuantizeConfig.from_dict({"group_sise": 64})


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizeConfig().bits = 3  # type: ignore[misc]


@pytest.mark.parametrize("config", [QuantizeConfig(), UNUSUAL])
def test_it_round_trips_through_dict_yaml_and_quantize_config_json(config):
    assert QuantizeConfig.from_dict(config.to_dict()) == config
    assert QuantizeConfig.from_yaml(config.to_yaml()) == config
    written = json.dumps(config.to_quantize_config())
    assert QuantizeConfig.from_quantize_config(json.loads(written)) == config


def test_quantize_config_json_has_the_keys_other_tools_read():
    values = QuantizeConfig().to_quantize_config()
    needed = {
        "quant_method",
        "bits",
        "group_size",
        "desc_act",
        "sym",
        "lm_head",
        "checkpoint_format",
        "format",
    }
    assert needed | {"pack_dtype", "meta", "damp_percent", "static_groups", "true_sequential"} <= set(values)
    assert values["quant_method"] == "gptq" and values["format"] == values["checkpoint_format"]
    assert values["meta"]["quantizer"][0].startswith("gptq_plugin:")


def test_a_damping_of_zero_stays_out_of_other_tools_sight():
    config = QuantizeConfig(damp_percent=0)
    values = config.to_quantize_config()
    assert "damp_percent" not in values and QuantizeConfig.from_quantize_config(values) == config


def test_autogptqs_file_is_read_with_its_meaning_of_absent_fields():
    config = QuantizeConfig.from_quantize_config(
        {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True,
         "true_sequential": False, "model_name_or_path": None, "model_file_base_name": "model"}
    )  # fmt: skip
    assert config.checkpoint_format == "gptq" and not config.static_groups and not config.true_sequential


def test_a_file_without_bits_is_refused():
    with pytest.raises(ValueError, match="needs `bits`"):
        QuantizeConfig.from_quantize_config({"quant_method": "awq", "w_bit": 4})


def test_the_first_dynamic_rule_that_matches_decides():
    config = QuantizeConfig(
        dynamic={r"-:.*\.0\.mlp": {}, r"+:.*\.0\.": {"bits": 8}, r".*attn": {"group_size": 32, "sym": False}}
    )
    assert config.for_module("layers.0.mlp.up") is None
    first = config.for_module("layers.0.attn.q")
    assert first is not None and (first.bits, first.group_size) == (8, 128)
    second = config.for_module("layers.1.attn.q")
    assert second is not None and (second.bits, second.group_size, second.sym) == (4, 32, False)
    third = config.for_module("layers.1.mlp.up")
    assert third == dataclasses.replace(config, dynamic={})


def test_rules_match_from_the_start_of_the_name():
    config = QuantizeConfig(dynamic={r"mlp": {"bits": 8}})
    rest = config.for_module("layers.0.mlp")
    assert rest is not None and rest.bits == 4


@pytest.mark.parametrize(
    ("group_size", "in_features", "own"),
    [(128, 256, 128), (96, 192, 96), (128, 192, 64), (128, 96, 32), (128, 72, -1), (32, 48, -1), (48, 128, 32)]
    + [(-1, 72, -1), (256, 384, 128)],
)
def test_groups_that_do_not_divide_a_layer_become_the_next_smaller_that_clients_know(group_size, in_features, own):
    assert QuantizeConfig(group_size=group_size).group_size_for(in_features) == own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"desc_act": True, "static_groups": False}, "no longer supports groups in act-order"),
        ({"bits": 8, "sym": False}, "bits=8 and sym=False runs on few GPUs"),
    ],
)
def test_what_compressed_tensors_cannot_hold_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(checkpoint_format="compressed-tensors", **options)
    QuantizeConfig(checkpoint_format="gptq", **options)
    for one in options:
        kept = {name: value for name, value in options.items() if name != one}
        assert QuantizeConfig(checkpoint_format="compressed-tensors", **kept).checkpoint_format == "compressed-tensors"


def test_the_rule_of_a_module_is_the_first_that_matches():
    config = QuantizeConfig(dynamic={"-:a": {}, "a|b": {"bits": 8}})
    assert config.rule_for("a.b") == ("-:a", {}) and config.rule_for("b") == ("a|b", {"bits": 8})
    assert config.rule_for("c.a") == ("", {}) and config.for_module("c.a") == dataclasses.replace(config, dynamic={})


def test_only_a_file_of_this_package_tells_how_it_quantized():
    written = UNUSUAL.to_quantize_config()
    assert own_config(written) == UNUSUAL
    converted = {"bits": 4, "meta": {"gptq_plugin": {"files": ["model.safetensors"]}}}
    for values in ({"bits": 4}, {**written, "meta": None}, {**written, "meta": {"gptq_plugin": "1.0"}}, converted):
        assert own_config(values) is None
    assert own_config({**written, "bits": 5}) is None


@pytest.mark.parametrize("value", [1, -2.5, float("nan")])
def test_ints_and_floats_are_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, (1,)])
def test_anything_else_is_not(value):
    assert not is_number(value)


@pytest.mark.parametrize(("name", "near"), [("bit", "bits"), ("groupsize", "group_size"), ("n_samples", "nsamples")])
def test_a_field_that_does_not_exist_is_answered_with_the_nearest_however_it_is_given(name, near):
    said = rf"unknown option '{name}': did you mean '{near}'\? QuantizeConfig has bits, group_size"
    with pytest.raises(TypeError, match=said):
        QuantizeConfig(**{name: 4})
    with pytest.raises(TypeError, match=said):
        dataclasses.replace(QuantizeConfig(), **{name: 4})
    for make in (QuantizeConfig.from_dict, lambda fields: QuantizeModule(**fields)):
        with pytest.raises(ValueError, match=said):
            make({name: 4})
    with pytest.raises(TypeError, match=r"unknown option 'zzz': QuantizeConfig has bits"):
        QuantizeConfig(zzz=1)
    with pytest.raises(ValueError, match=r"'cachedir': did you mean QuantizeModule\(cache_dir=\.\.\.\)\?"):
        QuantizeModule(cachedir="kept")
    with pytest.raises(TypeError, match=r"'step': did you mean 'steps'\? Finish has kind, steps"):
        Finish(step=50)


@pytest.mark.parametrize("kind", [GPTQCallback, GPTQTrainerCallback])
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("overwrit", "'overwrite'"),
        ("groupsize", "QuantizeModule(group_size=...)"),
        ("bits", "QuantizeModule(bits=...)"),
        ("held_out", "Finish(held_out=...)"),
    ],
)
def test_a_callback_answers_an_option_it_does_not_have_with_where_the_nearest_is_given(kind, name, near):
    said = rf"unknown option '{name}': did you mean {re.escape(near)}\? {kind.__name__} has quantizer, export_dir"
    with pytest.raises(TypeError, match=said):
        kind(QuantizeModule(), **{name: 4})


def test_the_constructor_keeps_its_signature_and_copies():
    parameters = inspect.signature(QuantizeConfig).parameters
    assert list(parameters) == [field.name for field in dataclasses.fields(QuantizeConfig)]
    assert parameters["bits"].default == 4
    assert QuantizeConfig(3, 64).group_size == 64
    config = QuantizeConfig(bits=3, dynamic={"x": {"bits": 8}})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("text", ["[" * 3000, "bits: 2026-99-99", "!!python/object/apply:os.system [x]", "{bits: "])
def test_text_that_is_no_yaml_is_refused_as_such(text):
    with pytest.raises(ValueError, match="a configuration must be YAML"):
        QuantizeConfig.from_yaml(text)


def test_a_method_is_the_values_of_its_fields_that_are_not_given():
    gptq, best = QuantizeConfig(), QuantizeConfig(method="best")
    assert (gptq.method, gptq.damp_percent, gptq.clip_candidates, gptq.scale_rounds) == ("gptq", 0.01, 2, 0)
    assert (best.damp_percent, best.clip_candidates, best.scale_rounds, best.refit_rounds) == (0.1, 1, 2, 3)
    assert len(gptq.clip_ratios) == 11 and len(best.clip_ratios) == 13
    some = QuantizeConfig(method="best", scale_rounds=0, damp_percent=0.02)
    assert (some.scale_rounds, some.damp_percent, some.refit_rounds) == (0, 0.02, 3)
    assert QuantizeConfig(refit_rounds=1).refit_rounds == 1  # a piece alone
    assert QuantizeConfig(method="best", **dict.fromkeys(METHOD_FIELDS)) == best  # YAML's null
    for config in (best, some):
        assert QuantizeConfig.from_yaml(config.to_yaml()) == config
        assert QuantizeConfig.from_quantize_config(config.to_quantize_config()) == config


def test_every_method_has_a_value_for_every_field_and_only_for_those():
    for values in METHODS.values():
        assert tuple(values) == METHOD_FIELDS and set(METHOD_FIELDS) <= set(MODULE_FIELDS)


def test_a_rule_that_sets_the_method_sets_its_fields_but_for_those_that_it_gives():
    config = QuantizeConfig(dynamic={"a": {"method": "best"}, "b": {"method": "best", "damp_percent": 0.05}})
    best = QuantizeConfig(method="best")
    assert config.for_module("a") == best and config.for_module("other") == QuantizeConfig()
    assert config.for_module("b") == dataclasses.replace(best, damp_percent=0.05)
    back = QuantizeConfig(method="best", damp_percent=0.2, dynamic={"a": {"method": "gptq"}})
    assert back.for_module("a") == QuantizeConfig() and back.for_module("b").damp_percent == 0.2
