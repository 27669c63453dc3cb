"""Checkpoint folders: from the hub's cache, with a named weights file, with a tokenizer beside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from gptq_plugin.autogptq.folders import check_basename, local_folder, tokenizer_kept
from gptq_plugin.errors import CheckpointError

from hub_caches import cache_checkpoint


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_is_itself_and_a_name_is_looked_up_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "here" / "part").mkdir(parents=True)
    (tmp_path / "here" / "part" / "config.json").write_text("{}")
    assert local_folder(tmp_path / "here") == tmp_path / "here"
    cache = tmp_path / "cache"
    cache_checkpoint(cache, "someone/opt-4bit", tmp_path / "here", revision="v1")
    found = local_folder("someone/opt-4bit", revision="v1", cache_dir=cache, local_files_only=True, subfolder="part")
    assert files(found) == {"config.json": "{}"}


@pytest.mark.parametrize("subfolder", [None, "part"])
def test_only_what_a_checkpoint_needs_is_downloaded(
    subfolder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["config.json", "model-1-of-2.safetensors", "code.py", "tokenizer.model", "pytorch_model.bin", "x.gguf"]
    files = [*there, *(f"part/{name}" for name in there)]
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    local_folder("someone/opt-4bit", token="t", subfolder=subfolder)
    chosen = set(filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    assert {f"part/{name}" for name in there[:4]} <= chosen
    assert (set(there[:4]) <= chosen) == (subfolder is None)
    assert not {name for name in chosen if name.endswith((".bin", ".gguf"))}
    assert (asked["name"], asked["token"]) == ("someone/opt-4bit", "t")


def test_a_name_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="someone/nothing is no folder, and huggingface_hub could not fetch"):
        local_folder("someone/nothing", cache_dir=tmp_path)


def test_model_basename_may_name_the_only_weights_whatever_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "gptq_model-4bit-128g.safetensors").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_basename(tmp_path, "gptq_model-4bit-128g")
    with pytest.warns(UserWarning, match="'model' is ignored: .* holds gptq_model-4bit-128g.safetensors"):
        check_basename(tmp_path, "model")


def test_model_basename_cannot_choose_among_several_weights(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "two.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"one.safetensors, two.safetensors, .* put two.safetensors into a"):
        check_basename(tmp_path, "two")
    (tmp_path / "two.safetensors.index.json").touch()
    check_basename(tmp_path, "two")  # its shards are listed there


@pytest.mark.parametrize("fails", [False, True])
def test_tokenizer_files_are_away_during_the_block_and_back_afterwards(tmp_path: Path, fails: bool) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("tokenizer.json", "vocab.json", "notes.txt"):
        (folder / name).write_text("mine")
    try:
        with tokenizer_kept(folder):
            assert files(folder) == {"notes.txt": "mine"}
            (folder / "vocab.json").write_text("written")
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert files(folder) == {"tokenizer.json": "mine", "vocab.json": "written", "notes.txt": "mine"}
    assert list(tmp_path.iterdir()) == [folder]


def test_tokenizer_files_come_back_when_the_block_removed_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    with tokenizer_kept(folder):
        folder.rmdir()
    assert files(folder) == {"tokenizer.json": "mine"}


def test_a_folder_that_is_not_there_yet_is_no_matter(tmp_path: Path) -> None:
    with tokenizer_kept(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []
