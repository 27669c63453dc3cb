"""Values and times are read without stalling a device, and side work is waited for."""

from __future__ import annotations

import time

import pytest
import torch

from gptq_plugin.device.streams import AsyncRead, Stopwatch, on_side_stream

CPU = torch.device("cpu")
SLEEP = 200_000_000  # cycles of a GPU: about a tenth of a second


def test_on_a_cpu_values_are_read_as_they_are():
    assert AsyncRead(torch.tensor([[1.5, 2.0], [3.0, -1.0]])).get() == [[1.5, 2.0], [3.0, -1.0]]
    assert AsyncRead(torch.tensor(7)).get() == 7


def test_a_stopwatch_counts_the_time_until_it_is_stopped_and_none_after():
    stopwatch = Stopwatch(CPU)
    time.sleep(0.05)
    stopwatch.stop()
    seconds = stopwatch.seconds()
    time.sleep(0.05)
    assert 0.05 <= seconds == stopwatch.seconds() < 5


def test_on_a_cpu_side_work_is_done_at_once():
    with on_side_stream(CPU) as wait:
        result = torch.ones(3).sum()
    wait()
    assert float(result) == 3


@pytest.mark.gpu
def test_on_a_gpu_a_value_arrives_while_later_work_is_still_queued():
    value = torch.tensor([1.0, 2.0], device="cuda")
    stream = torch.cuda.current_stream()
    torch.cuda.synchronize()
    value.mul_(2)
    read = AsyncRead(value)
    value.zero_()  # comes after the copy
    torch.cuda._sleep(10 * SLEEP)
    assert read.get() == [2.0, 4.0] and not stream.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_on_a_gpu_a_stopwatch_measures_the_device_and_does_not_wait_for_it():
    torch.cuda.synchronize()
    started = time.perf_counter()
    stopwatch = Stopwatch(torch.device("cuda"))
    torch.cuda._sleep(SLEEP)
    stopwatch.stop()
    torch.cuda._sleep(5 * SLEEP)  # not measured
    queued = time.perf_counter() - started
    seconds = stopwatch.seconds()
    torch.cuda.synchronize()
    assert queued < seconds < (time.perf_counter() - started) / 2


@pytest.mark.gpu
def test_on_a_gpu_the_side_stream_sees_earlier_work_and_the_current_one_waits_for_its_results():
    device, current = torch.device("cuda", torch.cuda.current_device()), torch.cuda.current_stream()
    x = torch.zeros(2**20, device=device)
    torch.cuda._sleep(SLEEP)
    x.fill_(3)  # queued behind the sleep
    with on_side_stream(device) as wait:
        assert torch.cuda.current_stream() != current
        torch.cuda._sleep(SLEEP)
        y = x * 2
    assert torch.cuda.current_stream() == current
    wait()
    x.zero_()  # y was computed before
    assert float(y.double().mean()) == 6
    with on_side_stream(device):
        side = torch.cuda.current_stream()
    with on_side_stream(device):
        assert torch.cuda.current_stream() == side  # one per device


@pytest.mark.gpu
def test_on_a_gpu_later_side_work_is_not_waited_for():
    device, x = torch.device("cuda", torch.cuda.current_device()), torch.ones(1, device="cuda")
    with on_side_stream(device) as wait:
        y = x * 2
    with on_side_stream(device):
        torch.cuda._sleep(10 * SLEEP)
        side = torch.cuda.current_stream()
    wait()
    assert float(y) == 2 and not side.query()
