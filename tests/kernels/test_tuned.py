"""What this process and its disk know of fast kernels: files that are there, damaged, foreign, shared or refused."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from gptq_plugin.kernels.product import tuned as module
from gptq_plugin.kernels.product.choice import Choice
from gptq_plugin.kernels.product.layout import Layout
from gptq_plugin.kernels.product.table import Key, Table
from gptq_plugin.kernels.product.tuned import file_of, read, tuned, version_of_kernels, write

from gpus import A100, L4

LAYOUT = Layout.of(4, 128, 4096, 4096, True)
KEYS = [Key.of(LAYOUT, rows, torch.float16) for rows in (1, 16, 2048)]


def table(*keys, choice="dense"):
    return Table(A100.name, A100.processors, "by hand", {key: Choice.parse(choice) for key in keys})


def test_the_file_is_of_a_gpu_a_triton_and_the_kernels_source(tmp_path, monkeypatch):
    file = file_of(A100, tmp_path)
    assert file.parent == tmp_path and file == file_of(A100, str(tmp_path))
    assert file.name.startswith("nvidia-a100-sxm4-80gb-108-triton-3.") and version_of_kernels() in file.name
    names = {file.name, file_of(L4, tmp_path).name, file_of(A100.__class__(A100.name, 54, False, 1, 1), tmp_path).name}
    monkeypatch.setattr(module, "version_of_kernels", lambda: "other")
    names.add(file_of(A100, tmp_path).name)
    monkeypatch.setattr(module.triton, "__version__", "9.9+x/../y")
    names.add(file_of(A100, tmp_path).name)
    assert len(names) == 5 and file_of(A100, tmp_path).parent == tmp_path


def test_without_a_folder_the_file_lies_in_tritons_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert file_of(A100, None).parent == tmp_path / "gptq_plugin"


def test_the_version_changes_with_any_source_of_the_kernels(tmp_path, monkeypatch):
    for name in ("few_rows.py", "codes.py"):
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "tuned.py"))

    def version():
        return version_of_kernels.__wrapped__()

    before = version()
    (tmp_path / "few_rows.py").write_text("two")
    assert before != version() and version() == version()


def test_what_is_written_is_read_and_added_to(tmp_path, caplog):
    file = tmp_path / "new" / "folder" / "file.json"
    assert read(file, A100) == {}
    write(file, table(KEYS[0]), A100)
    write(file, table(KEYS[1], KEYS[2]), A100)
    write(file, table(KEYS[2], choice="few_rows BM=8"), A100)
    found = read(file, A100)
    assert {key: str(choice) for key, choice in found.items()} == {
        KEYS[0]: "dense", KEYS[1]: "dense", KEYS[2]: "few_rows BM=8"
    }  # fmt: skip
    assert [path.name for path in file.parent.iterdir()] == [file.name] and not caplog.records


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\x00", b"[]", b"[" * 10**6, b"null", table(KEYS[0]).to_json().encode()[:-30]]
)
def test_a_damaged_file_is_told_counts_for_nothing_and_is_replaced(tmp_path, caplog, content):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    assert read(file, A100) == {}
    assert "measured again" in caplog.text and str(file) in caplog.text and caplog.records[0].levelname == "WARNING"
    write(file, table(KEYS[0]), A100)
    assert set(read(file, A100)) == {KEYS[0]}


def test_a_file_of_another_gpu_or_of_absurd_size_counts_for_nothing(tmp_path, caplog, monkeypatch):
    file = tmp_path / "file.json"
    write(file, table(KEYS[0]), A100)
    assert read(file, L4) == {} and "another GPU" in caplog.text
    monkeypatch.setattr(module, "_LARGEST", 10)
    assert read(file, A100) == {} and "more than 10 bytes" in caplog.text


@pytest.mark.parametrize("where", ["a file in place of the folder", "a folder in place of the file", "no such device"])
def test_a_place_that_cannot_be_written_is_told_and_does_no_harm(tmp_path, caplog, where):
    file = tmp_path / "in" / "file.json"
    if where == "a file in place of the folder":
        (tmp_path / "in").write_text("")
    elif where == "a folder in place of the file":
        (file / "full").mkdir(parents=True)
    else:
        file = Path("/proc/1/none/file.json")
    caplog.set_level(logging.WARNING)
    write(file, table(KEYS[0]), A100)
    assert "cannot be written" in caplog.text and read(file, A100) == {}
    left = list(tmp_path.rglob(".*"))
    assert not left, "the temporary file is removed"


def test_this_process_has_one_table_for_all_gpus_of_a_kind(monkeypatch):
    monkeypatch.setattr(module, "_of_process", {})
    assert tuned(A100) is tuned(A100) and tuned(A100) is not tuned(L4)
    assert tuned(A100).is_for(A100) and not tuned(A100).choices


def _write_often(file, number):
    layout = Layout.of(4, 128, 128, number, True)
    for _ in range(30):
        write(file, table(Key.of(layout, 1, torch.float16)), A100)


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path):
    file = tmp_path / "file.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_often, args=(file, number)) for number in (1, 2, 3)]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes):
        if file.exists():
            seen += bool(Table.parse(file.read_bytes()).choices)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert seen and read(file, A100) and [path.name for path in tmp_path.iterdir()] == [file.name]
    json.loads(file.read_text())
