"""A converted checkpoint holds what the folder holds, and nothing that links lead to elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptq_plugin.errors import CheckpointError
from gptq_plugin.export.convert import convert
from gptq_plugin.export.copied_files import copy_files, files_to_copy, occupied_bytes

from copies import LLAMA, edited

SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "id_rsa").write_text(SECRET)
    return edited(LLAMA, tmp_path / "source")


@pytest.mark.parametrize("name", ["merges.txt", "sub/merges.txt", "model.safetensors", "quantize_config.json"])
def test_a_link_that_leaves_the_folder_is_refused_and_nothing_is_written(
    name: str, folder: Path, tmp_path: Path
) -> None:
    link, target = folder / name, tmp_path / "elsewhere" / "id_rsa"
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        target = link.rename(tmp_path / "elsewhere" / "moved")
    link.symlink_to(target)
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*, outside of the checkpoint"):
        convert(folder, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "parent", "loop", "pipe", "dangling"])
def test_what_is_no_file_is_refused_by_name(kind: str, folder: Path, tmp_path: Path) -> None:
    link = folder / "thing"
    if kind == "pipe":
        os.mkfifo(link)
    else:
        (folder / "sub").mkdir()
        link.symlink_to({"folder": "sub", "parent": "..", "loop": "thing", "dangling": "nowhere"}[kind])
    with pytest.raises(CheckpointError, match="thing (is|cannot be read)"):
        convert(folder, tmp_path / "out", "gptq")


def test_a_name_that_is_no_text_is_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.json")).touch()
    with pytest.raises(CheckpointError, match=r"'\\udcff\.json', a name that is no text"):
        convert(folder, tmp_path / "out", "gptq")


def test_links_within_the_folder_become_files(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to("sub/a.txt")
    out = convert(folder, tmp_path / "out", "gptq")
    assert (out / "b.txt").read_text() == "a" == (out / "sub" / "a.txt").read_text()
    assert not (out / "b.txt").is_symlink()


def test_in_the_hubs_cache_links_may_lead_to_the_repositorys_blobs_alone(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "sub"
    blobs, others = (tmp_path / name / "blobs" for name in ("models--a--b", "models--a--c"))
    for made in (snapshot, blobs, others):
        made.mkdir(parents=True)
        (made / "blob").write_text(made.parent.name)
    (snapshot / "own").symlink_to(blobs / "blob")
    files = files_to_copy(snapshot, ["ignored"])
    assert files == [Path("blob"), Path("own")]
    copy_files(snapshot, files, tmp_path / "out")
    assert (tmp_path / "out" / "own").read_text() == "models--a--b"
    (snapshot / "ignored").symlink_to(others / "blob")
    assert files_to_copy(snapshot, ["ignored"]) == files
    with pytest.raises(CheckpointError, match="ignored is a link to"):
        files_to_copy(snapshot, [])


def test_a_sparse_file_is_copied_with_its_holes_and_counts_by_what_was_written(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    with (source / "x").open("wb") as file:
        file.write(b"a" * 10_000)
        file.seek(64 << 30)
        file.write(b"end")
    (source / "empty").touch()
    files = [Path("x"), Path("empty")]
    assert 10_000 <= occupied_bytes(source, files) < 1 << 20
    copy_files(source, files, target)
    with (target / "x").open("rb") as copy:
        assert copy.read(10_001) == b"a" * 10_000 + b"\0"
        copy.seek(64 << 30)
        assert copy.read() == b"end"
    assert occupied_bytes(target, files) < 1 << 20 and (target / "empty").read_bytes() == b""


def test_folders_very_deep_in_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    below = folder
    for _ in range(50):
        below = below / "d"
        below.mkdir()
    with pytest.raises(CheckpointError, match="is 50 folders below the checkpoint's"):
        convert(folder, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
