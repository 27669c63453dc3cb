"""Whole tensors in a folder of safetensors files, mapped from there, here by one rank.

tests/lightning/test_unsharded.py has two ranks, and two nodes without a common disk.
"""

from __future__ import annotations

import os

import pytest
import torch

from gptq_plugin import distributed
from gptq_plugin.errors import ExportError
from gptq_plugin.export.shard_writer import ShardWriter
from gptq_plugin.training.consolidated import consolidated

TENSORS = {"a.weight": torch.arange(5.0), "b": torch.ones(3, 7, dtype=torch.bfloat16).T, "c": torch.tensor(3)}


def one_rank(tensors, beside):
    return consolidated(tensors, beside, node=0, local_rank=0)


def test_the_tensors_lie_in_a_folder_beside_the_export_for_the_length_of_the_block(tmp_path):
    with one_rank(TENSORS.items(), tmp_path / "runs" / "out") as files:
        assert files.writes and files.folder.parent == tmp_path / "runs"
        assert files.folder.name.startswith(".out.") and list((tmp_path / "runs").iterdir()) == [files.folder]
        assert files.tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            found = files.tensors[name]
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype and found.shape == tensor.shape
    assert list((tmp_path / "runs").iterdir()) == []


def test_files_that_go_after_the_block_are_not_flushed_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waits for the disk"))
    with one_rank(TENSORS.items(), tmp_path / "out") as files:
        assert files.tensors.keys() == TENSORS.keys()


def test_a_tensor_is_written_before_the_next_one_takes_its_memory(tmp_path):
    def gathered():
        shared = torch.empty(4)
        for number in range(3):
            yield str(number), shared.fill_(number)

    with one_rank(gathered(), tmp_path / "out") as files:
        assert [files.tensors[str(number)].tolist() for number in range(3)] == [[number] * 4 for number in range(3)]


def test_the_folder_is_removed_after_an_error_in_the_block(tmp_path):
    with pytest.raises(KeyError), one_rank(TENSORS.items(), tmp_path / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_every_quantization_has_a_folder_of_layers(tmp_path):
    with one_rank(TENSORS.items(), tmp_path / "out") as files:
        folders = [files.layers()._folder for _ in range(2)]
        assert folders == [files.folder / "layers-1", files.folder / "layers-2"]


def test_a_disk_that_is_full_is_told_with_the_remedy_after_all_tensors_are_read(tmp_path, monkeypatch):
    """Other ranks wait for this one's part of each tensor."""
    read = []

    def gathered():
        for name, tensor in TENSORS.items():
            read.append(name)
            yield name, tensor

    def full(self, tensors):
        raise OSError("No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with (
        pytest.raises(ExportError, match=r"\(rank 0: No space left on device\)\. Choose an export_dir on a disk"),
        one_rank(gathered(), tmp_path / "out"),
    ):
        raise AssertionError("the block was entered")
    assert read == list(TENSORS) and list(tmp_path.iterdir()) == []


def test_an_error_of_gathering_itself_is_raised_as_it_is(tmp_path):
    def gathered():
        yield "a", torch.ones(1)
        raise MemoryError("no room for b")

    with pytest.raises(MemoryError, match="no room for b"), one_rank(gathered(), tmp_path / "out"):
        raise AssertionError("the block was entered")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ExportError, match=r"temporary folder beside the export \(rank 0: .*file"),
        one_rank(TENSORS.items(), tmp_path / "file" / "out"),
    ):
        raise AssertionError("the block was entered")


def test_a_rank_that_sees_no_folder_reports_it(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)  # which rank 0 gives a folder it does not see
    monkeypatch.setattr(distributed, "object_from_first", lambda _: (0, tmp_path / "nowhere"))
    with (
        pytest.raises(ExportError, match=r"\(rank 1: .*nowhere is not there\).*every rank of a node sees"),
        one_rank(TENSORS.items(), tmp_path / "out"),
    ):
        raise AssertionError("the block was entered")
