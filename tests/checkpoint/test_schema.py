"""Fields of another type are refused by file and field, before any is used: in load, check and convert alike."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_plugin import load_quantized
from gptq_plugin.check.lint import lint
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.schema import check_model_config
from gptq_plugin.errors import CheckpointError
from gptq_plugin.export.convert import convert

from copies import LLAMA, edited, set_quantization
from paths import FIXTURES

CT = "llmcompressor-w4g32"
OF_THE_MODEL: list[tuple[dict[str, Any], str]] = [
    ({"architectures": "LlamaForCausalLM"}, "Field 'architectures'"),
    ({"architectures": [3]}, "Field 'architectures'"),
    ({"auto_map": "x.Y"}, "Field 'auto_map'"),
    ({"text_config": 3}, "Field 'text_config'"),
    ({"text_config": {"quantization_config": []}}, "text_config: Field 'quantization_config'"),
    ({"quantization_config": "gptq"}, "Field 'quantization_config'"),
    ({"model_type": ["llama"]}, "Field 'model_type'"),
]
OF_THE_DESCRIPTION: list[tuple[dict[str, Any], str]] = [
    ({"bits": 4.0}, "Field 'bits' expected"),
    ({"bits": True}, "Field 'bits'"),
    ({"group_size": "32"}, "Field 'group_size'"),
    ({"sym": "false"}, "Field 'sym'"),
    ({"desc_act": 0}, "Field 'desc_act'"),
    ({"meta": 3}, "Field 'meta'"),
    ({"meta": {"gptq_plugin": 5}}, "meta: Field 'gptq_plugin'"),
    ({"meta": {"gptq_plugin": {"taken_over": 3}}}, "meta.gptq_plugin: Field 'taken_over'"),
    ({"dynamic": [".*"]}, "Field 'dynamic'"),
    ({"dynamic": {".*": 3}}, "Field 'dynamic'"),
    ({"dynamic": {".*": {"bits": 4.0}}}, "dynamic['.*']: Field 'bits'"),
    ({"quant_method": {}}, "Field 'quant_method'"),
    ({"checkpoint_format": 2}, "Field 'checkpoint_format'"),
    ({"model_file_base_name": "../x"}, "model_file_base_name must be the name of a file"),
]


@pytest.mark.parametrize(("values", "field"), OF_THE_MODEL + OF_THE_DESCRIPTION, ids=str)
def test_a_field_of_another_type_is_refused_by_name(values: dict[str, Any], field: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(values) if (values, field) in OF_THE_MODEL else set_quantization(config, **values)

    folder = edited(LLAMA, tmp_path / "x", config=change)
    for run in (load_quantized, Checkpoint.open, lambda folder: convert(folder, tmp_path / "out", "gptq")):
        with pytest.raises(CheckpointError) as caught:
            run(folder)
        assert field in str(caught.value) and str(folder / "config.json") in str(caught.value)
    assert any(field in error for error in lint(folder).errors)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda groups: groups.update(group_0=3), "Field 'config_groups'"),
        (lambda groups: groups["group_0"].update(targets="Linear"), "config_groups['group_0']: Field 'targets'"),
        (lambda groups: groups["group_0"].update(weights=[]), "config_groups['group_0']: Field 'weights'"),
        (lambda groups: groups["group_0"]["weights"].update(num_bits=4.0), "['group_0'].weights: Field 'num_bits'"),
        (lambda groups: groups["group_0"]["weights"].update(group_size={}), "['group_0'].weights: Field 'group_size'"),
        (lambda groups: groups["group_0"]["weights"].update(symmetric="no"), "['group_0'].weights: Field 'symmetric'"),
    ],
)
def test_fields_of_config_groups_are_refused_by_name(
    change: Callable[[dict[str, Any]], Any], field: str, tmp_path: Path
) -> None:
    folder = edit(CT, tmp_path, lambda config: change(config["quantization_config"]["config_groups"]))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(folder)
    assert field in str(caught.value)


def test_the_second_description_is_held_to_the_same_types(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    content = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps({**content, "meta": 3}))
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: Field 'meta'"):
        load_quantized(folder)


def test_a_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: set_quantization(c, bits="x" * 10_000))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_files_of_other_tools_have_the_types(name: str) -> None:
    try:
        Checkpoint.open(FIXTURES / name)
    except CheckpointError as error:
        assert "Field" not in str(error)  # optimum's states two formats


def edit(name: str, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    folder = tmp_path / "x"
    shutil.copytree(FIXTURES / name, folder)
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_more_rules_than_any_model_has_layers_are_refused_by_field_and_number(tmp_path: Path) -> None:
    rules: dict[str, Any] = {rf"x\.{i}$": {"bits": 4} for i in range(2**17 + 1)}
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: set_quantization(c, dynamic=rules))
    with pytest.raises(CheckpointError, match=r"config\.json: dynamic has 131,073 rules; at most 131,072 are read"):
        Checkpoint.open(folder)


def test_a_hundred_thousand_rules_for_names_are_read_in_seconds_and_the_first_that_matches_counts(
    tmp_path: Path,
) -> None:
    rules: dict[str, Any] = {rf"-:x\.{i}$": {} for i in range(100_000)} | {"(?i)MODEL": {"bits": 4, "group_size": 32}}
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: set_quantization(c, dynamic=rules))
    start = time.process_time()
    assert Checkpoint.open(folder).layers
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (
            [f".*x{i}$" for i in range(20_000)],
            "20,000 regular expressions that are no escaped names, of 168,890 letters",
        ),
        (["." * 300_000], "1 regular expressions that are no escaped names, of 300,000 letters"),
        (["(?i)" + "[Ā-\U0010ffff]" * 200], "1 regular expressions that are no escaped names, of 401,004 letters"),
        (["(?i)" + r"[\u0100-\U0010ffff]" * 200], "1 regular expressions that are no escaped names"),
    ],
)
@pytest.mark.parametrize("name", [LLAMA, CT])
def test_expressions_that_take_long_to_parse_are_refused_by_field_and_number(
    name: str, rules: list[str], told: str, tmp_path: Path
) -> None:
    described = {"ignore": [f"re:{rule}" for rule in rules]} if name == CT else {"dynamic": {key: {} for key in rules}}
    folder = shutil.copytree(FIXTURES / name, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    set_quantization(config, **described)
    (folder / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"config\.json: {next(iter(described))}: {told}"):
        Checkpoint.open(folder)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "given", ["\U000e0001" * 10_000_000, {"AutoModel": ["\U000e0001" * 10_000_000, 1]}], ids=["text", "in a list"]
)
def test_a_long_text_in_place_of_another_value_is_refused_without_much_memory(given: Any) -> None:
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"config\.json: Field 'auto_map'"):
        check_model_config({"auto_map": given}, Path("config.json"))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
