"""Free and used memory of a device and of the host."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from gptq_plugin.device import memory
from gptq_plugin.device.memory import (
    Peak,
    available_bytes,
    free_bytes,
    give_back,
    is_shortage,
    peak_bytes,
    trim,
    trimmed,
    with_index,
    with_room,
)

from forked_python import python

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30


def test_freed_memory_goes_back_without_cycles_of_objects():
    """It goes back hundreds of times in a quantization, in which Python hardly looks for them."""
    trim()
    gc.collect()
    trim()
    assert gc.collect() == 0


def test_a_cpu_has_no_limit_and_no_peak():
    peak = Peak(CPU)
    held = torch.empty(GIB // 64, dtype=torch.uint8)
    assert free_bytes(CPU) is None and free_bytes(CPU, limit=1) is None
    assert peak_bytes(CPU) is None and peak.bytes() == 0 and held.nbytes


def test_own_memory_grows_by_what_is_written_and_not_by_mapped_files(tmp_path):
    """In a process of its own: what other tests leave behind comes and goes when it will."""
    torch.zeros(2**24, dtype=torch.uint8).numpy().tofile(tmp_path / "file")
    script = """if True:
        import sys, torch
        from gptq_plugin.device.memory import own_bytes, trim

        before = own_bytes()
        mapped = torch.from_file(sys.argv[1], shared=True, size=2**24, dtype=torch.uint8)
        assert mapped.sum() == 0 and own_bytes() - before < 2**22
        held = torch.ones(2**27, dtype=torch.uint8)
        assert own_bytes() - before > 2**26 and held.all()
        trim()
        assert own_bytes() - before > 2**26  # what is in use stays
    """
    subprocess.run([python(), "-c", script, str(tmp_path / "file")], check=True, timeout=120)


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs Linux's /proc")
def test_the_hosts_free_memory_is_below_all_of_it_and_that_of_a_cgroup(monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < available_bytes() < whole
    files = {"meminfo": "MemFree: 1 kB\nMemAvailable:   2000 kB\n", "cgroup": "0::/jobs/7\n"}
    files |= {"memory.max": "1500000\n", "memory.current": "500000\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[path.name])
    assert available_bytes() == 10**6
    files["memory.max"] = "max\n"
    assert available_bytes() == 2000 * 1024
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    assert available_bytes() is None


def test_a_forward_gives_back_what_it_freed_whenever_the_process_has_grown(monkeypatch):
    sizes, trims = [], []
    monkeypatch.setattr(memory, "own_bytes", lambda: sizes.pop(0))
    monkeypatch.setattr(memory, "trim", lambda: trims.append(len(sizes)))
    large, small = torch.nn.Linear(512, 512), torch.nn.Linear(8, 512)
    model = torch.nn.Sequential(small, large, large)
    grown = memory._GROWTH + 1
    # At first; at each call of a large layer; after each trim.
    sizes[:] = [100, 100, 100 + grown, 300, 200, 200 + grown, 500]
    with trimmed(model):
        for _ in range(2):
            model(torch.ones(1, 8))
    assert trims == [4, 1] and not sizes
    assert not large._forward_hooks
    model(torch.ones(1, 8))  # nothing is asked any more


def test_small_layers_are_looked_at_by_the_parts_that_are_large_together():
    """Small buffers too stay with the process: of a model of many blocks, as much as its weights take."""

    def block():
        return torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(3)))  # 1.03 MiB

    blocks = torch.nn.ModuleList([block(), block()])
    large = torch.nn.Linear(512, 512)
    model = torch.nn.ModuleDict({"blocks": blocks, "head": large, "norm": torch.nn.LayerNorm(8)})
    assert set(memory._large_parts(model)) == {*blocks, large}
    assert memory._large_parts(torch.nn.Sequential(torch.nn.Linear(8, 8))) == []


def test_only_a_gpu_without_an_index_gets_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda", 3)
    for device in (torch.device("cuda", 1), CPU, torch.device("meta")):
        assert with_index(device) is device


@pytest.mark.parametrize(
    ("share", "limit", "expected"),
    [(1.0, None, 40 + 4), (0.5, None, 40 - 12), (1.0, 25, 25 - 10), (1.0, 100, 44), (0.5, 100, 28), (0.1, 5, 0)],
    ids=["free or reserved", "the process's share", "the limit", "a high limit", "the lower of both", "nothing"],
)
def test_free_memory_is_the_least_of_what_is_there_and_what_is_allowed(monkeypatch, share, limit, expected):
    values = {"mem_get_info": (40, 80), "memory_allocated": 10, "memory_reserved": 16,
              "memory_stats": {"inactive_split_bytes.all.current": 2},
              "get_per_process_memory_fraction": share}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(CUDA, limit) == expected


@pytest.mark.gpu
def test_free_memory_is_within_the_processs_share():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        before = free_bytes(CUDA)
        held = torch.empty(GIB, dtype=torch.uint8, device=CUDA)
        assert before <= total // 4 and before - free_bytes(CUDA) >= GIB
        del held
        assert free_bytes(CUDA) == before  # what the allocator keeps is free for us
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_on_a_gpu_a_peak_counts_what_came_and_went_since():
    before = torch.empty(GIB // 4, dtype=torch.uint8, device=CUDA)
    peak = Peak(CUDA)
    held = torch.empty(GIB // 8, dtype=torch.uint8, device=CUDA)
    del held
    assert GIB // 8 <= peak.bytes() < GIB // 4 and peak_bytes(CUDA) >= before.nbytes + GIB // 8


def test_what_finds_no_room_runs_once_more_after_some_was_made():
    attempts = []

    def run():
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("no room")
        return "done"

    assert with_room(run, lambda: True) == "done" and len(attempts) == 2


def test_what_finds_no_room_is_not_repeated_where_none_can_be_made():
    def run():
        raise torch.OutOfMemoryError("no room")

    made = []
    with pytest.raises(torch.OutOfMemoryError):
        with_room(run, lambda: bool(made.append(1)))
    with pytest.raises(torch.OutOfMemoryError):
        with_room(run, lambda: made.append(2) is None)
    assert made == [1, 2]


ELSEWHERE = [  # than in PyTorch's allocator, whose memory the driver and libraries do not have
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXpotrf_bufferSize(handle)`",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`. If you keep",
    "Triton Error [CUDA]: out of memory",
]


@pytest.mark.parametrize("said", ELSEWHERE)
@pytest.mark.parametrize("shortages", [1, 2])
def test_what_a_driver_or_library_finds_no_room_for_runs_once_more_even_if_no_tensor_was_left_to_free(said, shortages):
    attempts, made = [], []

    def run():
        attempts.append(1)
        if len(attempts) <= shortages:
            raise RuntimeError(said)
        return "done"

    with contextlib.nullcontext() if shortages == 1 else pytest.raises(RuntimeError, match=re.escape(said)):
        assert with_room(run, lambda: bool(made.append(1))) == "done"
    assert len(attempts) == 2 and made == [1]


def test_a_shortage_is_an_error_of_a_device():
    assert is_shortage(torch.OutOfMemoryError("no room"))
    assert not is_shortage(
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXpotrf(")
    )
    assert not is_shortage(ValueError(ELSEWHERE[0])) and not is_shortage(RuntimeError("CUDA error: unknown error"))


def test_other_errors_are_no_shortage():
    def run():
        raise RuntimeError("shape")

    with pytest.raises(RuntimeError, match="shape"):
        with_room(run, lambda: pytest.fail("nothing is short"))


@pytest.mark.parametrize(("own", "looks"), [(None, True), (10 * GIB, True), (49 * GIB, False), (60 * GIB, False)])
def test_cycles_are_looked_for_unless_hardly_more_than_what_is_needed_is_on_the_device(own, looks, monkeypatch):
    done = []
    monkeypatch.setattr(memory, "collect", lambda: done.append("collect"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 50 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    give_back(CUDA, own)
    assert done == ["collect"] * looks + ["empty"] * (own is None)


@pytest.mark.parametrize(("free", "own", "given"), [(27, 50, False), (26, 50, True), (27, None, True)])
def test_what_no_tensor_needs_is_given_back_unless_a_third_of_the_device_is_free_beside_it(
    free, own, given, monkeypatch
):
    done = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 50 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    give_back(CUDA, None if own is None else own * GIB)
    assert done == ["empty"] * given


@pytest.mark.gpu
def test_gaps_between_tensors_do_not_count_as_free_and_whole_segments_are_given_back():
    device = torch.device("cuda:0")
    give_back(device)
    held = [torch.empty(2**18, dtype=torch.uint8, device=device) for _ in range(64)]
    before = free_bytes(device)
    del held[::2]
    assert free_bytes(device) - before < 2**18 * 8
    reserved = torch.cuda.memory_reserved(device)
    del held
    give_back(device)
    assert torch.cuda.memory_reserved(device) < reserved
