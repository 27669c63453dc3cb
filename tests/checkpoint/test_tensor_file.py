"""Files written tensor by tensor: those of safetensors, byte for byte, and without a copy in memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptq_plugin.checkpoint.tensor_file import _DTYPES, write_tensors
from gptq_plugin.device.memory import own_bytes
from gptq_plugin.errors import ExportError


def odd_tensors():
    torch.manual_seed(0)
    values = {f"{dtype}.é{i}": torch.randn(3, i + 1).to(dtype) for dtype in _DTYPES for i in (2, 0)}
    return values | {
        "none": torch.zeros(0, 4, dtype=torch.int32),
        "number": torch.tensor(3.0),
        "turned": torch.randn(5, 7).half().T,
        'quoted "\\': torch.ones(1, dtype=torch.uint8),
    }


@pytest.mark.parametrize("metadata", [None, {"ö": '"1'}])
def test_the_file_is_that_of_safetensors(metadata, tmp_path):
    given = odd_tensors()
    write_tensors(given, tmp_path / "ours", metadata)
    save_file({name: t.contiguous() for name, t in given.items()}, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = load_file(tmp_path / "ours")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name].view(-1), t.reshape(-1)) for name, t in given.items() if t.element_size() > 1)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == metadata


def test_an_empty_file_and_a_dtype_without_a_name(tmp_path):
    write_tensors({}, tmp_path / "empty")
    assert load_file(tmp_path / "empty") == {}
    with pytest.raises(ExportError, match=r"x is of torch\.complex128"):
        write_tensors({"x": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_nothing_is_copied_in_memory(tmp_path):
    given = {str(i): torch.full((2**21,), i, dtype=torch.int32) for i in range(24)}  # 192 MiB
    before, most, over = own_bytes(), [0], threading.Event()

    def watch():
        while not over.wait(0.001):
            most.append(max(most.pop(), own_bytes() - before))

    watching = threading.Thread(target=watch)
    watching.start()
    write_tensors(given, tmp_path / "large")
    time.sleep(0.01)
    over.set()
    watching.join()
    assert most[0] < 16 * 2**20


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_file_that_the_disk_does_not_take_is_not_left(tmp_path):
    (tmp_path / "file").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_tensors({"a": torch.zeros(2**20)}, tmp_path / "file")
    assert not any(tmp_path.iterdir())
