"""A rehearsal refuses what the pass would refuse, with one batch of each source, and changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from plans import CONFIG, Attention, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.sources import Source, Sources
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.rehearsal import Rest, rehearse, rest_of

from models import tiny_llama


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
    assert ran == [0.0, 4.0, 0.0, 0.0, 0.0]  # and to compare threads, and the model with layers replaced
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
    assert ran == [8, 1, 1, 1] + [8] * 4  # one row: on another thread, on this one, and with layers replaced


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


def test_of_all_data_that_is_there_no_more_runs_than_shows_that_it_is_enough():
    ran = []
    forward = lambda network, batch: ran.append(len(batch)) or network(batch)  # noqa: E731
    everything = [rows(8, 32, seed) for seed in range(9)]
    rehearsed(nn.Sequential(nn.Linear(32, 32)), everything, whole=True, forward=forward, first_batches=[0])
    assert ran == [8, 1, 1, 1] + [8] * 3  # one row: on another thread, on this one, and with layers replaced


def test_tokens_are_counted_at_the_first_layer_alone():
    with pytest.raises(CalibrationError, match="20 tokens in 20 samples"):
        rehearsed(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), [rows(20, 32)], whole=True)


def test_positions_that_the_models_mask_leaves_out_are_not_counted():
    mask = torch.ones(4, 40, dtype=torch.long)
    mask[:, 10:] = 0
    batch = torch.ones(4, 40, dtype=torch.long), mask  # whose fields have no names
    forward = lambda model, batch: model(input_ids=batch[0], attention_mask=batch[1])  # noqa: E731
    with pytest.raises(CalibrationError, match="40 tokens in 4 samples"):
        rehearsed(tiny_llama(), [batch], whole=True, forward=forward)


def test_a_batch_without_labels_is_refused_though_another_one_ran():
    ids = torch.ones(4, 20, dtype=torch.long)
    calibration = calibration_of([{"input_ids": ids, "labels": ids}, {"input_ids": ids}])
    calibration.first_batches[:] = [0]
    plan = plan_of(tiny_llama(), dataclasses.replace(CONFIG, token_weighting="labels"))
    options = PassOptions(forward=lambda model, batch: model(input_ids=batch["input_ids"]))
    with pytest.raises(CalibrationError, match="batch 1 .*has no labels"):
        rehearse(plan, calibration, options, whole=False)


# --- several ranks ---


@pytest.fixture
def another_rank(monkeypatch):
    """Another rank reaches a layer, and counts 24 tokens in 24 samples. This one is rank 3."""

    def gather(own):
        told = {bool: True, int: 24, tuple: (24, 24)}.get(type(own))
        return [own] if told is None or (told == (24, 24) and len(own) != 2) else [own, told]

    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(distributed, "gather_objects", gather)


def test_tokens_of_all_ranks_count_and_one_rank_may_reach_no_layer(another_rank):
    model = nn.Sequential(nn.Linear(32, 32))
    reads = []
    rehearsed(model, [rows(8, 32)], whole=False, rest=rest([rows(8, 32)], 0, reads))
    assert reads == []  # 8 tokens here and 24 there
    rehearsed(model, [rows(8, 32)], whole=True)
    with pytest.raises(CalibrationError, match="too short: 31 tokens"):
        rehearsed(model, [rows(7, 32)], whole=True)
    rehearsed(model, [rows(8, 32)], whole=False, forward=lambda network, batch: batch)


def test_values_that_are_not_finite_are_refused_by_batch_and_rank(another_rank):
    with pytest.raises(CalibrationError, match=r"in calibration batch 0 \(rank 3\)"):
        rehearsed(nn.Sequential(nn.Linear(32, 32)), [rows(4, 32) * float("inf")], whole=False)


def test_the_rest_of_the_data_is_what_training_leaves_and_as_long_as_that_is_known_to_be():
    plan, options = plan_of(nn.Sequential(nn.Linear(32, 32))), PassOptions()
    assert rest_of(plan, None, options) is None
    stream = rest_of(plan, [rows(8, 32), rows(5, 32)], options)
    assert stream.at_least == 0 and stream.collect().samples == 13
    texts = rest_of(plan, Sources((Source([[1, 2, 3]] * 40, "texts", 16),)), options)
    assert texts.at_least == texts.collect().samples == 16
