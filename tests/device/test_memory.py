"""Free and used memory of a device."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.device.memory import Peak, free_bytes, peak_bytes, with_index

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
    [(1.0, None, 40 + 6), (0.5, None, 40 - 10), (1.0, 25, 25 - 10), (1.0, 100, 46), (0.5, 100, 30), (0.1, 5, 0)],
    ids=["free or reserved", "the process's share", "the limit", "a high limit", "the lower of both", "nothing"],
)
def test_free_memory_is_the_least_of_what_is_there_and_what_is_allowed(monkeypatch, share, limit, expected):
    values = {"mem_get_info": (40, 80), "memory_allocated": 10, "memory_reserved": 16,
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
