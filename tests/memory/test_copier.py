"""Copies are made on one thread beside the batches'."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from gptq_plugin.memory.copier import Copier

CPU = torch.device("cpu")


@pytest.fixture
def copier():
    copier = Copier(CPU)
    yield copier
    copier.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_copies_have_memory_of_their_own_and_parameters_stay_parameters(copier):
    parameter, buffer = nn.Parameter(torch.randn(3)), torch.arange(4)
    copies = copier.result(copier.start({1: parameter, 2: buffer}))
    assert list(copies) == [1, 2] and type(copies[1]) is nn.Parameter and type(copies[2]) is torch.Tensor
    for copy, original in ((copies[1], parameter), (copies[2], buffer)):
        assert torch.equal(copy, original) and copy.data_ptr() != original.data_ptr() and not copy.requires_grad


def test_a_function_runs_on_the_copying_thread_outside_the_callers_modes(copier):
    with torch.device("meta"), torch.inference_mode():
        made, thread = copier.call(lambda: (torch.empty(1), threading.current_thread()))
    assert made.device == CPU and not made.is_inference() and thread.name.startswith("weights")


def test_errors_are_raised_where_the_result_is_asked_for(copier):
    def fail():
        raise KeyError("solver")

    with pytest.raises(KeyError, match="solver"):
        copier.call(fail)
    transfer = copier.start({1: torch.empty(1, device="meta")})
    with pytest.raises(NotImplementedError, match="meta"):
        copier.result(transfer)
    assert copier.result(copier.start({})) == {}


def test_closing_drops_copies_that_have_not_begun():
    copier, go = Copier(CPU), threading.Event()
    running = threading.Thread(target=copier.call, args=(lambda: go.wait(10),))
    running.start()
    waiting = copier.start({1: torch.ones(1)})
    threading.Timer(0.1, go.set).start()
    copier.close()
    running.join()
    assert waiting.cancelled()


@pytest.mark.gpu
@pytest.mark.parametrize("side", [False, True], ids=["default stream", "another stream"])
def test_on_a_gpu_copies_wait_for_freed_memory_and_are_ready_for_the_current_stream(side):
    device = torch.device("cuda", torch.cuda.current_device())
    copier = Copier(device)
    originals = {n: torch.full((2**20,), float(n)) for n in range(8)}
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        stream = torch.cuda.current_stream()
        assert copier.call(torch.cuda.current_stream) == stream
        torch.cuda._sleep(200_000_000)
        copier.note_freed()
        transfer = copier.start(originals)
        assert not stream.query() and not transfer.done()  # the copy waits for what the stream is at
        copies = copier.result(transfer)
        sums = torch.stack([copies[n].double().mean() for n in originals])
        assert sums.tolist() == list(range(8)) and all(copy.device == device for copy in copies.values())
    copier.close()
