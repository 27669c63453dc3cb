"""AutoGPTQ's BaseQuantizeConfig: its defaults, its files, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptq_plugin import QuantizeConfig
from gptq_plugin.autogptq import BaseQuantizeConfig
from gptq_plugin.errors import CheckpointError

OLD_FILE = {  # as AutoGPTQ 0.5 wrote it
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.1,
    "desc_act": True,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": "somewhere",
    "model_file_base_name": "gptq_model-4bit-128g",
}


def test_defaults_are_autogptqs_but_for_static_groups() -> None:
    config = BaseQuantizeConfig()
    assert (config.bits, config.group_size, config.damp_percent) == (4, -1, 0.01)
    assert (config.desc_act, config.static_groups, config.sym, config.true_sequential) == (True, True, True, True)
    assert (config.quant_method, config.checkpoint_format) == ("gptq", "gptq")


def test_every_field_reaches_quantize_config() -> None:
    fields: dict[str, Any] = {
        "bits": 3,
        "group_size": 32,
        "damp_percent": 0.05,
        "desc_act": True,
        "static_groups": False,
        "sym": False,
        "true_sequential": False,
        "checkpoint_format": "gptq_v2",
    }
    assert BaseQuantizeConfig(**fields).forwarded(batch_size=3) == QuantizeConfig(**fields, batch_size=3)
    same = BaseQuantizeConfig(4, 128, 0.1, False).forwarded()
    assert same == QuantizeConfig(bits=4, group_size=128, damp_percent=0.1, desc_act=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bit": 4}, "BaseQuantizeConfig: unknown option 'bit': did you mean 'bits'"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8; got 5"),
        ({"group_size": 0}, "group_size must be -1 or a positive integer"),
        ({"quant_method": "awq"}, "does not take quant_method='awq'"),
        ({"checkpoint_format": "marlin"}, "does not take checkpoint_format='marlin': export 'gptq', which vLLM"),
        ({"is_marlin_format": True}, "does not take is_marlin_format=True: export 'gptq'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BaseQuantizeConfig(**options)


def test_options_past_desc_act_need_their_names_since_versions_order_them_differently() -> None:
    with pytest.raises(TypeError, match="positional"):
        BaseQuantizeConfig(4, 128, 0.1, False, True)  # type: ignore[misc]


def test_autogptqs_file_is_read_with_what_its_absent_fields_meant(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps(OLD_FILE))
    config = BaseQuantizeConfig.from_pretrained(tmp_path)
    assert config == BaseQuantizeConfig(
        **{**OLD_FILE, "static_groups": False, "model_name_or_path": str(tmp_path)}  # type: ignore[arg-type]
    )


def test_config_json_is_read_where_there_is_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 8, "group_size": 64}}))
    config = BaseQuantizeConfig.from_pretrained(str(tmp_path))
    assert (config.bits, config.group_size, config.desc_act) == (8, 64, False)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "has neither quantize_config.json nor a quantization_config in config.json"),
        ({"config.json": "{}"}, "has neither quantize_config.json nor a quantization_config in config.json"),
        ({"quantize_config.json": '{"group_size": 1}'}, "quantize_config.json describes no GPTQ checkpoint: .* `bits`"),
        ({"quantize_config.json": "no"}, "quantize_config.json cannot be read as JSON"),
        ({"quantize_config.json": '{"bits": 4.0}'}, "quantize_config.json: .*bits"),
        ({"config.json": '{"quantization_config": {"bits": 4, "sym": 1}}'}, "config.json: .*sym"),
    ],
)
def test_a_folder_without_a_description_is_refused(files: dict[str, str], match: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=match):
        BaseQuantizeConfig.from_pretrained(tmp_path)


def test_what_it_saves_it_reads(tmp_path: Path) -> None:
    config = BaseQuantizeConfig(bits=3, group_size=64, static_groups=False, model_name_or_path=str(tmp_path))
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == config.to_dict()
    assert BaseQuantizeConfig.from_pretrained(tmp_path) == config


def test_an_exports_own_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "quantize_config.json"
    file.write_text(before := json.dumps(QuantizeConfig(bits=3).to_quantize_config()))
    BaseQuantizeConfig(bits=3).save_pretrained(tmp_path)
    assert file.read_text() == before
