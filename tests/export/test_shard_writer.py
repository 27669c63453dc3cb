"""Writing shards in the background: all arrives, nobody waits needlessly, memory is let go, failures surface."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_plugin.checkpoint.tensor_file import write_tensors
from gptq_plugin.errors import ExportError
from gptq_plugin.export import shard_writer as shards
from gptq_plugin.export.shard_writer import ShardWriter

from forked_python import python

KB = 1000


def tensors(prefix: str, kilobytes: int = 4) -> dict[str, Tensor]:
    """Two of odd names and other dtypes, together about so many kilobytes."""
    n = kilobytes * 125
    return {f"{prefix}.a": torch.randint(-9, 9, (n, 1), dtype=torch.int32), f"{prefix}.b": torch.randn(2 * n).half()}


def content(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        assert not found.keys() & held.keys()
        found.update(held)
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The disk writes nothing until this is set."""
    opened = threading.Event()

    def save(*args: Any, **kwargs: Any) -> None:
        assert opened.wait(20)
        write_tensors(*args, **kwargs)

    monkeypatch.setattr(shards, "write_tensors", save)
    return opened


def test_what_fits_in_one_shard_is_one_file_without_an_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 100 * KB)
    first, second = tensors("x"), tensors("y")
    writer.add(first)
    writer.add(second)
    assert set(writer.finish()["model.safetensors"]) == {*first, *second}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert same(content(tmp_path), {**first, **second})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_that_wait_for_their_shard_are_mapped_from_a_file_without_a_name_and_then_from_the_shard(
    tmp_path: Path,
) -> None:
    writer = ShardWriter(tmp_path, 100 * KB, piece_bytes=10 * KB)
    added = [tensors(prefix, 6) for prefix in "abc"]
    for some in added:
        writer.add(some)
    wait_until(lambda: writer.read("b.a") is not None)
    assert writer.read("c.a") is None and not list(tmp_path.iterdir())  # c is in memory: too little for a file
    waiting = writer.read("b.a")
    assert waiting is not None and torch.equal(waiting, added[1]["b.a"]) and not writer.is_in_shard("b.a")
    last = tensors("d", 100)
    writer.add(last)
    wait_until(lambda: writer.is_in_shard("b.a"))
    for name, tensor in {**added[0], **added[1], **added[2], **last}.items():
        read = writer.read(name)
        assert read is not None and torch.equal(read, tensor)
    assert not writer._gathered and not writer._pieces and not writer._loose
    writer.add(tensors("e", 6))
    assert set(writer.finish()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    alone = ShardWriter(tmp_path / "alone", 100 * KB)
    (tmp_path / "alone").mkdir()
    for some in (*added, last):
        alone.add(some)
    alone.finish()
    shard = tmp_path / "model-00001-of-00002.safetensors"
    assert shard.read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("durable", [True, False])
def test_a_shard_is_on_the_disk_before_the_next_one_only_if_it_is_to_last(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    writer = ShardWriter(tmp_path, 4 * KB, durable=durable)
    given = tensors("x") | tensors("y")
    for name in ("x", "y"):
        writer.add({key: value for key, value in given.items() if key.startswith(name)})
    writer.finish()
    assert len(flushed) == (2 if durable else 0)
    assert all(torch.equal(value, given[name]) for name, value in content(tmp_path).items())


def test_more_is_written_in_shards_with_an_index_that_names_every_tensor(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10 * KB)
    given = {f"l{i}": tensors(f"l{i}") for i in range(7)}
    for some in given.values():
        writer.add(some)
    files = writer.finish(total_parameters=5)
    wanted = {name: tensor for some in given.values() for name, tensor in some.items()}
    names = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    assert sorted(files) == names
    assert sorted(f.name for f in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    assert same(content(tmp_path), wanted)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 5, "total_size": sum(t.nbytes for t in wanted.values())}
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file) and name in files[file]
    assert index["weight_map"].keys() == wanted.keys()


@pytest.mark.parametrize(("kilobytes", "names"), [(50, 1), (200, 2)], ids=["small", "large"])
def test_a_file_of_somebody_else_joins_the_only_shard_if_both_are_small(
    kilobytes: int, names: int, tmp_path: Path
) -> None:
    writer = ShardWriter(tmp_path, 100 * KB)
    ours, theirs = tensors("ours"), tensors("theirs", kilobytes)
    writer.add(ours)
    save_file(theirs, tmp_path / "model.safetensors")
    assert len(writer.finish([tmp_path / "model.safetensors"])) == names
    assert len(list(tmp_path.glob("*.safetensors"))) == names
    assert same(content(tmp_path), {**ours, **theirs})


def test_files_of_somebody_else_are_numbered_with_ours(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10 * KB)
    given = {**tensors("a", 12), **tensors("b"), **tensors("c"), **tensors("d")}
    writer.add({name: t for name, t in given.items() if name[0] == "a"})
    writer.add({name: t for name, t in given.items() if name[0] == "b"})
    theirs = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, letter in zip(theirs, "cd", strict=True):
        save_file({name: t for name, t in given.items() if name[0] == letter}, file)
    assert list(writer.finish(theirs)) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert same(content(tmp_path), given)


@pytest.mark.parametrize(
    ("sizes", "each", "calls", "before_it_waits"),
    [
        pytest.param({"shard_bytes": 10 * KB}, 5, 8, 4, id="beyond two shards"),
        pytest.param(
            {"shard_bytes": 100 * KB, "piece_bytes": 10 * KB},
            10,
            30,
            5,
            id="beyond half a shard of what may wait in files",
        ),
    ],
)
def test_add_returns_while_the_disk_is_busy_and_waits_only(
    sizes: dict[str, int], each: int, calls: int, before_it_waits: int, tmp_path: Path, gate: threading.Event
) -> None:
    writer = ShardWriter(tmp_path, **sizes)
    added: list[int] = []

    def add() -> None:
        for i in range(calls):
            writer.add(tensors(f"l{i}", each))
            added.append(i)

    thread = threading.Thread(target=add)
    thread.start()
    wait_until(lambda: len(added) == before_it_waits)
    time.sleep(0.2)
    assert added == [*range(before_it_waits)]
    gate.set()
    thread.join(20)
    assert len(added) == calls
    assert sum(map(len, writer.finish().values())) == 2 * calls
    assert writer._held == writer._waiting == writer._in_memory == 0


def test_layers_are_taken_while_the_disk_is_waited_for_and_its_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, fails = threading.Event(), []

    def fsync(_: int) -> None:
        assert waits.wait(20)
        if fails:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    writer = ShardWriter(tmp_path, 10 * KB)
    for i in range(8):
        writer.add(tensors(f"l{i}", 10))
    wait_until(lambda: writer.is_in_shard("l7.a"))
    fails.append(0)
    waits.set()
    with pytest.raises(
        ExportError, match=r"shard-0000\d.safetensors could not be written.*Input/output error. See to it"
    ):
        writer.finish()


def test_what_is_prepared_is_made_on_the_writers_thread(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10 * KB)
    threads = []

    def prepare(given: dict[str, Tensor]) -> dict[str, Tensor]:
        threads.append(threading.current_thread())
        return {name: tensor + 1 for name, tensor in given.items()}

    given = tensors("x")
    writer.add(given, prepare)
    writer.finish()
    assert threads[0] is not threading.current_thread()
    assert same(content(tmp_path), {name: tensor + 1 for name, tensor in given.items()})


def test_tensors_read_from_a_shard_outlive_its_name_and_the_file(tmp_path: Path, gate: threading.Event) -> None:
    writer = ShardWriter(tmp_path, 10 * KB)
    given = tensors("x", 20)
    writer.add(given)
    assert writer.read("x.a") is None
    gate.set()
    wait_until(lambda: writer.read("x.a") is not None)
    early = {name: writer.read(name) for name in given}
    writer.finish()
    late = {name: writer.read(name) for name in given}
    for file in tmp_path.iterdir():
        file.unlink()
    assert same(early, given) and same(late, given)  # type: ignore[arg-type]


def test_an_error_on_the_thread_is_raised_by_the_next_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shards, "write_tensors", save)
    writer = ShardWriter(tmp_path, 10 * KB)
    with pytest.raises(ExportError, match=r"(?s)shard-00001\.safetensors.*no space left.*needs 15000 bytes.*make room"):
        for i in range(100):  # never waits for what can no longer be written
            writer.add(tensors(f"l{i}", 15))
    with pytest.raises(ExportError, match="no space left"):
        writer.finish()


def test_a_file_that_cannot_be_mapped_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to open file <x> in read-only mode: Too many open files (24)")

    monkeypatch.setattr(shards, "safe_open", fails)
    with pytest.raises(ExportError, match=r"x\.safetensors cannot be mapped: .*Too many open files"):
        shards._mapped(tmp_path / "x.safetensors")


def test_the_error_on_a_full_disk_names_the_file_and_the_room_it_needs(tmp_path: Path) -> None:
    program = f"""
import resource, torch
from pathlib import Path
from gptq_plugin.errors import ExportError
from gptq_plugin.export.shard_writer import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
writer = ShardWriter(Path({str(tmp_path)!r}), 300_000)
writer.add({{"x": torch.zeros(100_000)}})
try:
    writer.finish()
except ExportError as error:
    print(error)
"""
    said = subprocess.run([python(), "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "shard-00001.safetensors could not be written" in said.stdout and "400000 bytes" in said.stdout


def test_given_up_it_writes_no_more_and_takes_no_more(tmp_path: Path, gate: threading.Event) -> None:
    writer = ShardWriter(tmp_path, 10 * KB)
    for i in range(4):
        writer.add(tensors(f"l{i}", 5))
    threading.Timer(0.1, gate.set).start()
    writer.abort()
    assert len(list(tmp_path.iterdir())) <= 1  # the file it was writing
    with pytest.raises(ExportError, match="given up"):
        writer.add(tensors("more"))


def anonymous() -> int:
    """Megabytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_when_tensors_are_let_go_for_the_files(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 16 * 10**6)
    held: dict[str, Tensor] = {}
    before, most = anonymous(), 0
    for i in range(60):
        held[f"l{i}"] = torch.full((2 * 10**6,), i, dtype=torch.int32)
        writer.add({f"l{i}": held[f"l{i}"]})
        for name in held:
            mapped = writer.read(name)
            if mapped is not None:
                held[name] = mapped
        most = max(most, anonymous() - before)
    writer.finish()
    assert most < 100  # of 480: two shards, what waits to be let go, and the allocator's slack
    assert all(int(tensor[7]) == int(name[1:]) for name, tensor in held.items())


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_without_waiting_for_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10 * KB)
    warm = {name: tensor.cuda() for name, tensor in tensors("warm").items()}
    writer.add(warm)  # makes pinned memory, which may wait for the device
    time.sleep(0.2)
    given = {name: tensor.cuda() for name, tensor in tensors("x").items()}
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    for tensor in given.values():
        tensor += 1  # after the sleep: a copy that does not wait for it has the old values
    torch.cuda.set_sync_debug_mode("error")
    try:
        writer.add(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not busy.query()
    wanted = {name: tensor.cpu() for name, tensor in {**warm, **given}.items()}
    del given
    writer.finish()
    assert same(content(tmp_path), wanted)
