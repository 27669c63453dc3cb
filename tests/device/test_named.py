"""A device that is none, or that this process does not have, is refused with what to give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.device.named import device_named

WRONG = [
    ("gpu", "device='gpu' is no device: give 'cpu', 'cuda' or 'cuda:1'"),
    ("cuda:x", "device='cuda:x' is no device"),
    (None, "device=None is no device"),
]


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, built): as if the process saw so many, of a PyTorch built for them or not."""

    def pretend(count, built="12.8"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.version, "hip", None, raising=False)

    return pretend


@pytest.mark.parametrize(("device", "message"), WRONG)
def test_what_is_no_device_is_refused(device, message):
    with pytest.raises(ValueError, match=message):
        device_named(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1), 0])
def test_a_gpu_is_refused_where_there_is_none_with_the_reason(device, gpus):
    gpus(0, built=None)
    with pytest.raises(ValueError, match="has no GPU here: it is built without CUDA. Leave device out, or give 'cpu'"):
        device_named(device)
    gpus(0)
    with pytest.raises(ValueError, match="it sees no GPU"):
        device_named(device)


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(gpus):
    gpus(2)
    with pytest.raises(ValueError, match="device='cuda:2', and there are 2 GPUs here: give 'cuda:0' to 'cuda:1'"):
        device_named("cuda:2")
    assert device_named("cuda:1") == torch.device("cuda", 1) and device_named("cuda") == torch.device("cuda", 0)


def test_a_cpu_is_a_device():
    assert device_named("cpu") == device_named(torch.device("cpu")) == torch.device("cpu")


def test_every_way_to_name_a_device_refuses_before_any_work(gpus, tmp_path):
    gpus(0)
    unread = (1 / 0 for _ in range(3))  # data that must not be read
    model = nn.Sequential(nn.Linear(32, 32))
    for run in (
        lambda: QuantizeModule(group_size=32).quantize(model, unread, device="cuda"),
        lambda: QuantizeModule(group_size=32).rehearse(model, unread, device="cuda"),
        lambda: load_quantized(tmp_path / "nowhere", device="cuda"),
    ):
        with pytest.raises(ValueError, match="device='cuda', and PyTorch .* has no GPU here"):
            run()
