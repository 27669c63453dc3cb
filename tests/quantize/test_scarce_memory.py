"""Where an allocation fails in the middle, less is kept on the device and the quantization goes on.

An operation of the model finds no room at a chosen call; on a CPU, waiting batches' bytes move to another buffer.
"""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.quantize import solve_on_ranks

CALLS = {"count": itertools.count(1), "fail": frozenset()}


@torch.library.custom_op("gptq_plugin_tests::scarce", mutates_args=())
def scarce(x: torch.Tensor) -> torch.Tensor:
    if next(CALLS["count"]) in CALLS["fail"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
    return x.relu()


class Scarce(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + scarce(layer(x))
        return x


def _quantized(fail, **options):
    CALLS.update(count=itertools.count(1), fail=frozenset(fail))
    torch.manual_seed(1)
    batches = [torch.randn(1, 6000, 64) for _ in range(4)]  # their activations are more than a megabyte
    model = Scarce()
    report = QuantizeModule(bits=4, group_size=32, batch_size=1, **options).quantize(model, batches)
    return {name: layer.qweight for name, layer in model.named_modules() if hasattr(layer, "qweight")}, report


@pytest.mark.parametrize("options", [{}, {"offload_weights": True}])
@pytest.mark.parametrize("call", [2, 22, 27])  # of the planning forward, and of the walk
def test_an_operation_that_finds_no_room_runs_again_with_less_kept(call, options, caplog):
    right, _ = _quantized(())
    with caplog.at_level(logging.WARNING):
        found, report = _quantized({call}, **options)
    assert right.keys() == found.keys() and all(torch.equal(right[name], found[name]) for name in right)
    assert any("no room on cpu" in message for message in caplog.messages)
    assert any("ran out of memory once" in one for one in report.all_deviations())


def test_without_anything_left_to_free_the_error_is_raised_and_the_model_is_float():
    CALLS.update(count=itertools.count(1), fail=frozenset(range(22, 90)))
    model, x = Scarce(), torch.randn(1, 600, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError):
        QuantizeModule(bits=4, group_size=32, batch_size=1).quantize(model, [x + i for i in range(4)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_solve_that_finds_no_room_runs_again(monkeypatch):
    right, _ = _quantized(())
    solve, calls = solve_on_ranks.solve, itertools.count(1)

    def failing(*args, **options):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solve(*args, **options)

    monkeypatch.setattr(solve_on_ranks, "solve", failing)
    found, report = _quantized(())
    assert all(torch.equal(right[name], found[name]) for name in right)
    assert any("ran out of memory once" in one for one in report.all_deviations())
