"""A rehearsal refuses what the pass would refuse, with one batch of each source, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from plans import Attention, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin.errors import CalibrationError
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.rehearsal import rehearse


def rehearsed(model, batches, *, whole=True, forward=None, first_batches=None):
    calibration = calibration_of(batches)
    if first_batches is not None:
        calibration.first_batches[:] = first_batches
    rehearse(plan_of(model), calibration, PassOptions(forward=forward), whole=whole)


def test_one_batch_of_each_source_runs_and_the_model_stays_as_it_is():
    model, ran = Attention(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = lambda network, batch: ran.append(float(batch[0, 0])) or network(batch)  # noqa: E731
    batches = [torch.full((1, 32), float(n)) for n in range(6)]
    rehearsed(model, batches, whole=False, forward=forward, first_batches=[0, 4])
    assert ran == [0.0, 4.0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_values_that_are_not_finite_are_refused_at_the_layer_that_reads_them():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].bias[3] = float("inf")
    with pytest.raises(
        CalibrationError, match=r"the input of 1 holds NaN or infinity in calibration batch 0 \(rank 0\)"
    ):
        rehearsed(model, [rows(4, 32)], whole=False)


def test_padding_may_hold_anything():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, input_ids, attention_mask):
            x = torch.ones(*input_ids.shape, 32)
            x[attention_mask == 0] = float("nan")
            return self.layer(x)

    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    rehearsed(Padded(), [batch], whole=False)


def test_length_is_judged_only_of_all_the_data():
    ids = [[1, 2, 3], [4, 5]]
    forward = lambda network, batch: network(torch.ones(5, 32))  # noqa: E731
    model = nn.Sequential(nn.Linear(32, 32))
    rehearsed(model, ids, whole=False, forward=forward)
    with pytest.raises(CalibrationError, match="too short: 5 tokens in 2 samples"):
        rehearsed(model, ids, whole=True, forward=forward)
    rehearsed(model, [rows(2, 32)], whole=True)  # tokens that are not known are not judged


def test_a_forward_that_reaches_no_layer_is_refused():
    with pytest.raises(CalibrationError, match="no calibration batch reached any of the 4 layers"):
        rehearsed(Attention(), [rows(2, 32)], forward=lambda network, batch: batch)


def test_data_without_samples_is_refused():
    with pytest.raises(CalibrationError, match="the calibration set is empty"):
        rehearsed(Attention(), [])
