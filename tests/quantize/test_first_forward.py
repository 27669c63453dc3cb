"""What the first forward shows: bytes that a pass needs, and which batches may run together."""

from __future__ import annotations

import pytest
import torch
from plans import calibration_of, plan_of
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.memory import placement
from gptq_plugin.quantize.first_forward import most_together, put_together, sizes_of

GIB = 2**30


def test_sizes_are_samples_where_another_rank_does_not_know_its_tokens(monkeypatch):
    batches = calibration_of([[1] * 3, [1] * 9]).batches
    assert sizes_of(batches) == [3, 9]
    monkeypatch.setattr(distributed, "minimum", lambda value: False)
    assert sizes_of(batches) == [1, 1]


def test_no_tensor_of_batches_put_together_has_more_elements_than_32_bits_number():
    assert most_together(plan_of(nn.Sequential(nn.Linear(32, 48)))) == 2**17
    with torch.device("meta"):
        wide = nn.Sequential(nn.Linear(32, 2**16), nn.Linear(2**16, 32))
    assert most_together(plan_of(wide)) == 2**15


def together(free, forward, most=1000):
    calibration = calibration_of([[1] * 5] * 12, QuantizeConfig(nsamples=12, batch_size=2))
    needs = placement.Needs(weights=0, fixed=0, solver=0, forward=forward, activations=GIB, batch=GIB // 6)
    gpu = torch.device("cuda", 0)
    found, then = put_together(
        calibration, [10] * 6, most, free, needs, lambda needs: placement.place(gpu, free, needs, 0, None, None)
    )
    return [batch.samples for batch in found.batches], then.forward / forward, then.batch / needs.batch


def test_batches_are_put_together_as_far_as_data_size_and_room_go():
    assert together(100 * GIB, GIB) == ([12], 6, 6)  # no more is planned for than there is
    assert together(100 * GIB, GIB, most=45) == ([8, 4], 4.5, 4.5)
    sizes, *times = together(10 * GIB, GIB)
    assert sizes == [6, 6] and times == pytest.approx([10 / 3, 10 / 3])
    assert together(2 * GIB, GIB) == ([2] * 6, 1, 1)
    assert together(None, GIB)[0] == [2] * 6
