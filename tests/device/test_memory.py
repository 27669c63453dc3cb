"""Free and used memory of a device."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.device.memory import Peak, free_bytes, give_back, peak_bytes, with_index, with_room

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30


def test_a_cpu_has_no_limit_and_no_peak():
    peak = Peak(CPU)
    held = torch.empty(GIB // 64, dtype=torch.uint8)
    assert free_bytes(CPU) is None and free_bytes(CPU, limit=1) is None
    assert peak_bytes(CPU) is None and peak.bytes() == 0 and held.nbytes


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


def test_other_errors_are_no_shortage():
    def run():
        raise RuntimeError("shape")

    with pytest.raises(RuntimeError, match="shape"):
        with_room(run, lambda: pytest.fail("nothing is short"))


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
