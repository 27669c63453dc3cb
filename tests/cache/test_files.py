"""A folder of kept tensors: complete files or none, none that is damaged, and no more than fit."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gptq_plugin.cache.files import KeptFiles

KEY, OTHER, THIRD = "a" * 64, "b" * 64, "c" * 64
TENSORS = {"mean": torch.randn(64, 64), "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0)}
SIZE = 17_500  # bytes of such a file, about


def kept_in(folder, limit=10**9):
    return KeptFiles(folder / "cache", limit)


def test_what_was_written_is_read_with_its_values_and_what_was_not_is_not_there(tmp_path):
    files = kept_in(tmp_path)
    assert files.read("hessian", KEY) is None and not files.problems
    files.write("hessian", KEY, {"tokens": 3, "deviations": ["é"]}, TENSORS)
    kept = kept_in(tmp_path).read("hessian", KEY)
    assert kept.facts == {"tokens": 3, "deviations": ["é"]}
    assert all(torch.equal(kept.tensors[name], value) for name, value in TENSORS.items())
    assert files.read("solution", KEY) is None and files.read("hessian", OTHER) is None
    assert files.written == sum(path.stat().st_size for path in files.folder.iterdir()) > 0


def test_tensors_with_one_memory_and_views_are_kept(tmp_path):
    files, whole = kept_in(tmp_path), torch.arange(12.0).reshape(3, 4)
    given = {"one": whole, "same": whole, "turned": whole.T, "part": whole[1:]}
    files.write("solution", KEY, {}, given)
    kept = files.read("solution", KEY)
    assert not files.problems and all(torch.equal(kept.tensors[name], value) for name, value in given.items())


@pytest.mark.parametrize("place", [-1, 200, 9, 0])
def test_a_file_with_another_byte_is_told_and_not_read(tmp_path, place):
    files = kept_in(tmp_path)
    files.write("hessian", KEY, {"tokens": 3}, TENSORS)
    (path,) = files.folder.iterdir()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert files.read("hessian", KEY) is None
    assert len(files.problems) == 1 and "is damaged and was computed again" in files.problems[0]


@pytest.mark.parametrize("size", [0, 5, 3000])
def test_a_file_that_was_cut_is_told_and_not_read(tmp_path, size):
    files = kept_in(tmp_path)
    files.write("hessian", KEY, {}, TENSORS)
    (path,) = files.folder.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    assert files.read("hessian", KEY) is None and len(files.problems) == 1


def test_a_file_under_the_name_of_another_is_told_and_not_read(tmp_path):
    files = kept_in(tmp_path)
    files.write("hessian", KEY, {"tokens": 1}, {})
    (path,) = files.folder.iterdir()
    path.rename(files.folder / f"hessian-{OTHER}.safetensors")
    assert files.read("hessian", OTHER) is None and "is damaged" in files.problems[0]


def aged(files, key, seconds):
    path = files.folder / f"hessian-{key}.safetensors"
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_files_unused_for_longest_make_room_and_reading_is_use(tmp_path):
    files = kept_in(tmp_path, limit=int(2.5 * SIZE))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    for age, key in ((300, KEY), (200, OTHER)):
        files.write("hessian", key, {}, TENSORS)
        aged(files, key, age)
    assert files.read("hessian", KEY) is not None
    files.write("hessian", THIRD, {}, TENSORS)
    assert [files.read("hessian", key) is not None for key in (KEY, OTHER, THIRD)] == [True, False, True]
    assert (tmp_path / "cache" / "notes.txt").read_text() == "mine" and not files.problems


def test_a_file_that_cannot_fit_is_told_and_leaves_nothing(tmp_path):
    files = kept_in(tmp_path, limit=SIZE // 2)
    files.write("hessian", KEY, {}, TENSORS)
    assert "does not fit" in files.problems[0] and not list(files.folder.iterdir())


def test_what_a_killed_process_was_writing_is_removed_after_an_hour(tmp_path):
    files = kept_in(tmp_path)
    files.folder.mkdir()
    for name, age in ((".writing-old", 7200), (".writing-new", 10)):
        (files.folder / name).write_text("half")
        os.utime(files.folder / name, (time.time() - age,) * 2)
    files.write("hessian", KEY, {}, {})
    assert sorted(path.name for path in files.folder.iterdir()) == [".writing-new", f"hessian-{KEY}.safetensors"]


def test_tensors_stay_readable_when_another_process_removes_their_file(tmp_path):
    files = kept_in(tmp_path)
    files.write("hessian", KEY, {}, TENSORS)
    kept = files.read("hessian", KEY)
    next(files.folder.iterdir()).unlink()
    assert torch.equal(kept.tensors["mean"], TENSORS["mean"])


def test_writers_and_readers_at_once_see_whole_files(tmp_path):
    def work(number):
        files = kept_in(tmp_path, limit=4 * SIZE)
        for turn in range(20):
            key = "abcdef"[(number + turn) % 6] * 64
            files.write("hessian", key, {"key": key}, {"mean": TENSORS["mean"]})
            kept = files.read("hessian", key)
            assert kept is None or kept.facts == {"key": key}
        return files.problems

    with ThreadPoolExecutor(4) as pool:
        assert [problem for problems in pool.map(work, range(4)) for problem in problems if "damaged" in problem] == []


def test_other_users_may_read_what_was_written(tmp_path):
    before = os.umask(0o022)
    try:
        files = kept_in(tmp_path)
        files.write("hessian", KEY, {}, {})
    finally:
        os.umask(before)
    (path,) = files.folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_interruption_leaves_no_half_file(tmp_path, monkeypatch):
    def interrupted(plain, path, metadata):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("gptq_plugin.cache.files.save_file", interrupted)
    files = kept_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        files.write("hessian", KEY, {}, {})
    assert not list(files.folder.iterdir())


def test_the_files_of_other_processes_count(tmp_path, monkeypatch):
    monkeypatch.setattr("gptq_plugin.cache.files._LOOK_EVERY", 2)
    mine, theirs = (kept_in(tmp_path, limit=int(3.5 * SIZE)) for _ in range(2))
    for number, files in enumerate((mine, theirs, theirs, theirs, mine, mine)):
        files.write("hessian", f"{number}" * 64, {}, TENSORS)
    assert len(list(mine.folder.iterdir())) <= 4


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "cache").write_text("")
    files = kept_in(tmp_path)
    files.write("hessian", KEY, {}, {})
    files.write("hessian", OTHER, {}, {})
    assert len(files.problems) == 1 and files.problems[0].startswith("nothing more is kept in")
    assert files.read("hessian", KEY) is None
