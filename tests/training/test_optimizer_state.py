"""An optimizer's state leaves the device for a block, and is back afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.training.optimizer_state import on_cpu


def stepped(device, kind=torch.optim.AdamW):
    layer = nn.Linear(4, 3, device=device)
    optimizer = kind(layer.parameters())
    layer(torch.ones(2, 4, device=device)).sum().backward()
    optimizer.step()
    return layer, optimizer


def tensors(optimizer):
    return [(key, value) for state in optimizer.state.values() for key, value in state.items()]


def test_a_state_on_the_cpu_is_not_touched():
    _, optimizer = stepped("cpu")
    before = tensors(optimizer)
    with on_cpu([optimizer]):
        assert all(value is old for (_, value), (_, old) in zip(tensors(optimizer), before, strict=True))
    assert all(value is old for (_, value), (_, old) in zip(tensors(optimizer), before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("fails", [False, True])
def test_a_state_on_a_gpu_waits_on_the_cpu_and_comes_back_also_after_an_error(fails):
    layer, optimizer = stepped("cuda")
    optimizer.state[layer.weight]["history"] = [torch.ones(2, device="cuda"), 3]
    before = [(key, value.clone() if isinstance(value, torch.Tensor) else value) for key, value in tensors(optimizer)]
    try:
        with on_cpu([optimizer]):
            assert all(not value.is_cuda for _, value in tensors(optimizer) if isinstance(value, torch.Tensor))
            assert not optimizer.state[layer.weight]["history"][0].is_cuda
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert optimizer.state[layer.weight]["history"][0].is_cuda and optimizer.state[layer.weight]["history"][1] == 3
    for (key, value), (_, old) in zip(tensors(optimizer), before, strict=True):
        if isinstance(value, torch.Tensor):
            assert value.device == old.device and torch.equal(value, old), key


def test_every_device_is_left_and_found_again():
    _, optimizer = stepped("cpu")
    state = next(iter(optimizer.state.values()))
    state["far"] = {"deep": [torch.ones(2, device="meta"), "text"]}
    moved = []
    meta = torch.Tensor.cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x.device.type) or torch.ones(2))
        with on_cpu([optimizer]):
            assert state["far"]["deep"][0].device.type == "cpu"
    assert moved == ["meta"] and state["far"]["deep"][0].is_meta and state["far"]["deep"][1] == "text"
    assert torch.Tensor.cpu is meta


def test_a_state_that_was_cleared_in_the_block_stays_so():
    _, optimizer = stepped("cpu")
    with on_cpu([optimizer]):
        optimizer.state.clear()
    assert not optimizer.state
