"""Checkpoint folders: with a named weights file, with a tokenizer beside."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from gptq_plugin.autogptq.folders import check_basename, tokenizer_kept
from gptq_plugin.errors import CheckpointError


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


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
