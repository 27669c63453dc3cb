"""Which files a checkpoint consists of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptq_plugin import load_quantized
from gptq_plugin.checkpoint.files import description_in, read_json, weight_files, write_json
from gptq_plugin.errors import CheckpointError

from copies import LLAMA, edited, sharded


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x", config=lambda c: c.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"neither a quantization_config in .* nor a quantize_config"):
        load_quantized(folder)


def test_json_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "config.json").write_text('{"bits": ')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        load_quantized(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_quantized(folder)


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lists .* which is not the name of a file of this folder"):
        load_quantized(folder)


def test_config_json_counts_before_quantize_config_and_a_text_models_part_of_it_too(tmp_path: Path) -> None:
    beside = tmp_path / "quantize_config.json"
    beside.write_text('{"bits": 3}')
    inside = {"quantization_config": {"bits": 4}}
    assert description_in(tmp_path, inside) == ({"bits": 4}, tmp_path / "config.json")
    assert description_in(tmp_path, {"text_config": inside}) == ({"bits": 4}, tmp_path / "config.json")
    assert description_in(tmp_path, {}) == ({"quant_method": "gptq", "bits": 3}, beside)
    with pytest.raises(CheckpointError, match=r"must be an object, got 'x'"):
        description_in(tmp_path, {"quantization_config": "x"})


def test_the_weights_are_the_named_file_the_only_one_or_those_of_an_index(tmp_path: Path) -> None:
    (tmp_path / "gptq_model-4bit-128g.safetensors").touch()
    named = {"model_file_base_name": "gptq_model-4bit-128g"}
    for description in ({}, named):
        assert list(weight_files(tmp_path, description)) == [tmp_path / "gptq_model-4bit-128g.safetensors"]
    (tmp_path / "other.safetensors").touch()
    assert list(weight_files(tmp_path, named)) == [tmp_path / "gptq_model-4bit-128g.safetensors"]
    with pytest.raises(CheckpointError, match=r"in one model\.safetensors, or in shards .* it has gptq_model"):
        weight_files(tmp_path, {})
    (tmp_path / "gptq.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}})
    )
    assert weight_files(tmp_path, {}) == {tmp_path / "1.safetensors": ["a", "c"], tmp_path / "2.safetensors": ["b"]}
    (tmp_path / "gptq.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        weight_files(tmp_path, {})
    (tmp_path / "model.safetensors").touch()  # which counts before an index
    assert list(weight_files(tmp_path, {})) == [tmp_path / "model.safetensors"]


def test_json_is_an_object_and_is_written_so_that_it_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"a": [1, "é"]})
    assert read_json(tmp_path / "x") == {"a": [1, "é"]} and (tmp_path / "x").read_text().endswith("}\n")
    (tmp_path / "x").write_text("[]")
    with pytest.raises(CheckpointError, match="x must hold a JSON object, got list"):
        read_json(tmp_path / "x")
