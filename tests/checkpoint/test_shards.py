"""Which files hold a checkpoint's tensors, and which of two files with the same tensor counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_plugin import load_quantized
from gptq_plugin.check.float_weights import FloatWeights
from gptq_plugin.check.lint import lint
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.shards import Shards
from gptq_plugin.errors import CheckpointError

from copies import LLAMA, edited, sharded

INDEX = "model.safetensors.index.json"


def write(folder: Path, **files: dict[str, float]) -> None:
    for name, tensors in files.items():
        save_file({key: torch.tensor([value]) for key, value in tensors.items()}, folder / f"{name}.safetensors")


def index(folder: Path, **weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_quantized(folder)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "", ".", "..", "/etc/passwd", "x" * 10**5])
def test_an_index_that_points_outside_the_folder_is_refused(shard: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = shard
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lists .* which is not the name of a file of this folder") as told:
        load_quantized(folder)
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize("shard", ["x" * 255, "a\0b", "two"])
def test_a_file_that_cannot_be_is_named(shard: str, tmp_path: Path) -> None:
    index(tmp_path, a=shard)
    with pytest.raises(CheckpointError, match=r"does not exist or is no regular file, and .* lists a in it"):
        Shards.open(tmp_path)


def test_a_pipe_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        Shards.open(tmp_path)


def test_the_weights_are_the_named_file_the_only_one_or_those_of_an_index(tmp_path: Path) -> None:
    write(tmp_path, **{"gptq_model-4bit-128g": {"a": 1}})
    for base in ("model", "gptq_model-4bit-128g"):
        assert Shards.open(tmp_path, base).read("a") == 1
    write(tmp_path, other={"a": 2})
    assert Shards.open(tmp_path, "gptq_model-4bit-128g").read("a") == 1
    with pytest.raises(CheckpointError, match=r"in one model\.safetensors, or in shards .* it has gptq_model"):
        Shards.open(tmp_path)
    (tmp_path / "gptq.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    assert Shards.open(tmp_path).read("a") == 2
    (tmp_path / "gptq.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Shards.open(tmp_path)
    write(tmp_path, model={"a": 3})
    assert Shards.open(tmp_path).read("a") == 3  # which counts before an index


def test_of_a_tensor_in_two_shards_the_one_that_the_index_lists_counts(tmp_path: Path) -> None:
    write(tmp_path, one={"a": 1, "b": 2}, two={"a": 3, "c": 4})
    for home, value in (("one", 1), ("two", 3)):
        index(tmp_path, a=f"{home}.safetensors", b="one.safetensors", c="two.safetensors")
        assert Shards.open(tmp_path).read("a") == FloatWeights(tmp_path).tensor("a") == value
    index(tmp_path, b="one.safetensors", c="two.safetensors")
    with pytest.raises(
        CheckpointError, match=r"two\.safetensors and one\.safetensors both hold a, which .* does not list"
    ):
        Shards.open(tmp_path)


def test_a_checkpoint_loads_what_its_index_lists(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "x")
    last = folder / "model-00002-of-00002.safetensors"
    in_first = next(iter(load_file(folder / "model-00001-of-00002.safetensors")))
    whole = Checkpoint.open(folder).read(in_first)
    save_file({**load_file(last), in_first: whole * 0}, last)
    assert torch.equal(Checkpoint.open(folder).read(in_first), whole)


@pytest.mark.parametrize("name", ["a\nerror: all is well", "\x1b[2Ja", "a\u202eb", "a\0", "n" * 1001])
def test_a_tensor_whose_name_would_mislead_who_reads_it_is_refused(name: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has a tensor named .*made to mislead") as refused:
        Shards.open(tmp_path)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_a_tensor_may_have_any_name_that_can_be_read(tmp_path: Path) -> None:
    """It is a name among modules, and no path."""
    names = {"../../etc/passwd", "漢字.weight", "a b", "n" * 1000, ""}
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    assert set(Shards.open(tmp_path).entries) == names


def test_weights_of_which_most_were_never_written_are_refused_as_a_download_that_did_not_end(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8 : 8 + size]), len(data) - 8 - size
    header["x.weight"] = {"dtype": "F16", "shape": [10 << 20, 1 << 10], "data_offsets": [end, end + (20 << 30)]}
    made = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(made).to_bytes(8, "little") + made + data[8 + size :])
        file.truncate(file.tell() + (20 << 30))
    for read in (load_quantized, lint):
        with pytest.raises(CheckpointError, match=r"model\.safetensors .* is a sparse file, of which less than half"):
            refuse(read(folder))


def refuse(found: Any) -> None:
    """Raises what `lint` finds."""
    raise CheckpointError(found.errors[0])


def test_thousands_of_tensors_without_values_are_refused(tmp_path: Path) -> None:
    empty = torch.empty(0)
    save_file({f"x{i}": empty.clone() for i in range(1001)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1001 tensors without values \(x0, x1, .* and 997 more\)"):
        Shards.open(tmp_path)
    save_file({f"x{i}": empty.clone() for i in range(1000)}, tmp_path / "model.safetensors")
    assert len(Shards.open(tmp_path).entries) == 1000


def test_a_message_about_many_tensors_names_some_and_counts_the_others(tmp_path: Path) -> None:
    folder = edited(LLAMA, tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    save_file({**state, **{f"x{i}": torch.ones(1) for i in range(500)}}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"x0 belongs to no module[\s\S]*and 480 more like these") as told:
        load_quantized(folder)
    assert len(str(told.value)) < 3000
