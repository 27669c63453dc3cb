"""A rehearsal refuses what the pass would refuse, with one batch of each source, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from plans import Attention, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.rehearsal import Rest, rehearse


def rehearsed(model, batches, *, whole=True, forward=None, first_batches=None, rest=None):
    calibration = calibration_of(batches)
    if first_batches is not None:
        calibration.first_batches[:] = first_batches
    rehearse(plan_of(model), calibration, PassOptions(forward=forward), whole=whole, rest=rest)


def test_one_batch_of_each_source_runs_and_the_model_stays_as_it_is():
    model, ran = Attention(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = lambda network, batch: ran.append(float(batch[0, 0])) or network(batch)  # noqa: E731
    batches = [torch.full((1, 32), float(n)) for n in range(6)]
    rehearsed(model, batches, whole=False, forward=forward, first_batches=[0, 4])
    assert ran == [0.0, 4.0, 0.0, 0.0]  # and twice to compare the model with layers replaced
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_values_that_are_not_finite_are_refused_at_the_layer_that_reads_them():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].bias[3] = float("inf")
    with pytest.raises(CalibrationError, match=r"input of 1 holds NaN or infinity, since 0\.bias of the model does"):
        rehearsed(model, [rows(4, 32)], whole=False)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(CalibrationError, match=r"input of 0 holds NaN or infinity in calibration batch 0 \(rank 0\)"):
        rehearsed(model, [rows(4, 32) * float("inf")], whole=False)


@pytest.mark.parametrize("name", ["q", "k", "o"])
def test_a_weight_that_is_not_finite_is_blamed_on_its_layer_alone(name):
    model = Attention()
    with torch.no_grad():
        model.get_submodule(name).weight[5, 3] = float("nan")
    with pytest.raises(TargetError, match=rf"^{name}: the weight holds NaN or infinity\. Training diverged"):
        rehearsed(model, [rows(40, 32)], whole=False)


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
    rehearsed(model, [rows(32, 32)], whole=True)
    with pytest.raises(CalibrationError, match="too short: 31 tokens in 31 samples"):
        rehearsed(model, [rows(2, 32), rows(29, 32)], whole=True)


def test_a_forward_that_reaches_no_layer_is_refused():
    with pytest.raises(CalibrationError, match="no calibration batch reached any of the 4 layers"):
        rehearsed(Attention(), [rows(2, 32)], forward=lambda network, batch: batch)


def test_data_without_samples_is_refused():
    with pytest.raises(CalibrationError, match="the calibration set is empty"):
        rehearsed(Attention(), [])


# --- length of data of which only a part is tried ---


def rest(batches, at_least, reads):
    def collect():
        reads.append(at_least)
        return calibration_of(batches)

    return Rest(at_least, collect)


@pytest.mark.parametrize(
    ("first", "of_all", "at_least", "reads"),
    [
        (32, 32, 0, 0),  # the first batch is enough by itself
        (8, 64, 64, 0),  # and so are clearly as many like it
        (8, 40, 40, 1),  # not clearly: counted
        (8, 40, 0, 1),  # a stream, of unknown length
    ],
)
def test_data_is_read_before_training_only_where_a_part_leaves_its_length_in_doubt(first, of_all, at_least, reads):
    model, seen = nn.Sequential(nn.Linear(32, 32)), []
    everything = [rows(8, 32, seed) for seed in range(of_all // 8)]
    rehearsed(model, [rows(first, 32)], whole=False, rest=rest(everything, at_least, seen))
    assert len(seen) == reads


@pytest.mark.parametrize("at_least", [0, 24])
def test_data_that_is_too_short_is_refused_though_only_a_part_is_tried(at_least):
    model = nn.Sequential(nn.Linear(32, 32))
    everything = [rows(8, 32, seed) for seed in range(3)]
    with pytest.raises(CalibrationError, match="too short: 24 tokens in 24 samples"):
        rehearsed(model, everything[:1], whole=False, rest=rest(everything, at_least, []))


def test_of_all_data_no_more_runs_than_shows_that_it_is_enough():
    ran = []
    forward = lambda network, batch: ran.append(len(batch)) or network(batch)  # noqa: E731
    model, everything = nn.Sequential(nn.Linear(32, 32)), [rows(8, 32, seed) for seed in range(9)]
    rehearsed(model, everything[:1], whole=False, rest=rest(everything, 0, []), forward=forward)
    assert ran == [8, 1, 1] + [8] * 4  # one row twice: the model with layers replaced, and without


def test_rows_of_a_layer_that_is_called_often_count_each_time():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(32, 32)

        def forward(self, x):
            for _ in range(4):
                x = torch.tanh(self.cell(x))
            return x

    rehearsed(Recurrent(), [rows(8, 32)], whole=True)
    with pytest.raises(CalibrationError, match="28 tokens in 7 samples"):
        rehearsed(Recurrent(), [rows(7, 32)], whole=True)
