"""Which files a checkpoint consists of."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gptq_plugin import load_quantized
from gptq_plugin.checkpoint.files import description_in, read_json, write_json
from gptq_plugin.errors import CheckpointError

from copies import LLAMA, edited, sharded

INDEX = "model.safetensors.index.json"


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"neither a quantization_config in .* nor a quantize_config"):
        load_quantized(folder)


def test_json_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "config.json").write_text('{"bits": ')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        load_quantized(folder)


def test_config_json_counts_before_quantize_config_and_a_text_models_part_of_it_too(tmp_path: Path) -> None:
    beside = {"bits": 3}
    inside = {"quantization_config": {"bits": 4}}
    assert description_in(inside, beside, tmp_path) == ({"bits": 4}, tmp_path / "config.json")
    assert description_in({"text_config": inside}, beside, tmp_path) == ({"bits": 4}, tmp_path / "config.json")
    described = description_in({}, beside, tmp_path)
    assert described == ({"quant_method": "gptq", "bits": 3}, tmp_path / "quantize_config.json")


def test_json_is_an_object_and_is_written_so_that_it_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"a": [1, "é"]})
    assert read_json(tmp_path / "x") == {"a": [1, "é"]} and (tmp_path / "x").read_text().endswith("}\n")
    (tmp_path / "x").write_text("[]")
    with pytest.raises(CheckpointError, match="x must hold a JSON object, got list"):
        read_json(tmp_path / "x")


@pytest.mark.parametrize(
    "content", ["[" * 100_000 + "]" * 100_000, '{"a": ' * 100_000, '{"a": "\\ud800"}', '{"a": 1' + "0" * 5000 + "}"]
)
def test_json_that_python_cannot_take_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "generation_config.json"])
def test_a_pipe_or_a_loop_of_links_in_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} does not exist or is no regular file"):
        load_quantized(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(CheckpointError, match=rf"{name} does not exist or is no regular file"):
        load_quantized(folder)


def test_nan_is_no_value_and_infinity_is(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"time_step_limit": [0.0, Infinity, -Infinity]}')
    assert read_json(tmp_path / "x") == {"time_step_limit": [0.0, float("inf"), -float("inf")]}
    (tmp_path / "x").write_text('{"rms_norm_eps": NaN}')
    with pytest.raises(CheckpointError, match=r"x cannot be read as JSON \(rms_norm_eps is NaN\)"):
        read_json(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": {"b": [1, {"c": NaN}]}}', "a.b[1].c is NaN"),
        ('{"a": {"b": [1, "\\udfff"]}}', "a.b[1] has half of a letter"),
        ('{"a": {"\\ud800": NaN}}', "a name in .a has half of a letter"),
        ('{"\\ud800": {"b": 1}}', "a name in it has half of a letter"),
    ],
)
def test_the_field_of_a_value_that_cannot_be_is_named(text, place, tmp_path):
    (tmp_path / "x").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(place)) as caught:
        read_json(tmp_path / "x")
    str(caught.value).encode()


def test_values_that_only_look_so_are_read(tmp_path):
    (tmp_path / "x").write_text('{"NaN": ["\\u00e9", "\\ud83d\\ude00", Infinity, "NaN"]}')
    assert read_json(tmp_path / "x") == {"NaN": ["é", "😀", float("inf"), "NaN"]}


def test_a_key_that_occurs_twice_is_refused_since_readers_take_one_or_the_other(tmp_path: Path) -> None:
    many = ", ".join(f'"{n}": 1' for n in range(20_000))
    for text in ('{"bits": 4, "bits": 8}', '{"a": [{"bits": 4, "bits": 4}]}', f'{{{many}, "bits": 1, "bits": 2}}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"x\.json cannot be read as JSON \(it holds 'bits' twice\)"):
            read_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "generation_config.json", INDEX])
def test_a_sparse_file_of_json_is_refused_by_name_and_size(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x") if name == INDEX else edited(LLAMA, tmp_path / "x")
    with (folder / name).open("ab") as file:
        file.truncate(64 << 30)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has 68,719,476,736 bytes, and at most 134,217,728"):
        load_quantized(folder)
