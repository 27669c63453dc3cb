"""What calibration data must be, judged over all ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from plans import CONFIG, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import digest
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.quantize.data_checks import (
    check_enough,
    check_finite,
    count_samples,
    known_tokens,
    not_finite,
    not_finite_on_ranks,
    unreached,
)


@pytest.fixture
def with_rank(monkeypatch):
    """with_rank(value): from now on a second rank gives that value wherever ranks meet."""

    def other(value):
        monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, value])

    return other


def test_samples_are_named_by_what_they_hold_in_whatever_order():
    one, other = rows(3, 8, seed=1), rows(5, 8, seed=2)
    samples = count_samples(calibration_of([one, other]))
    assert samples.count == 8
    assert samples.sha256 == f"{(digest(one) + digest(other)) % 2**256:064x}"
    again = count_samples(calibration_of([other, one]))
    assert again.sha256 == samples.sha256 and again.run_id != samples.run_id
    assert count_samples(calibration_of([one])).sha256 != samples.sha256


def test_samples_of_two_ranks_are_those_of_one_that_has_them_all(with_rank):
    one, other = rows(3, 8, seed=1), rows(5, 8, seed=2)
    whole = count_samples(calibration_of([one, other]))
    with_rank((5, digest(other), "of the second"))
    samples = count_samples(calibration_of([one]))
    assert (samples.count, samples.sha256) == (whole.count, whole.sha256)
    assert samples.run_id != "of the second"


def test_a_rank_without_samples_is_fine_and_none_at_all_is_not(with_rank):
    with pytest.raises(CalibrationError, match="the calibration set is empty: 1 empty calibration samples dropped"):
        count_samples(calibration_of([[]]))
    with_rank((2, 7, "x"))
    assert count_samples(calibration_of([])).count == 2
    with_rank((0, 0, "x"))
    with pytest.raises(CalibrationError, match="the calibration set is empty$"):
        count_samples(calibration_of([]))


def test_tokens_are_known_if_every_batch_of_every_rank_tells_them(with_rank):
    ids = calibration_of([[1, 2, 3], [4, 5]])
    assert known_tokens(ids) == 5
    assert known_tokens(calibration_of([rows(3, 8)])) is None
    with_rank(40)
    assert known_tokens(ids) == 45
    with_rank(None)
    assert known_tokens(ids) is None


def test_as_many_tokens_as_the_narrowest_layer_has_inputs_are_enough():
    plan = plan_of(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)))
    check_enough(32, 4, plan)
    with pytest.raises(CalibrationError, match="31 tokens in 4 samples, while even the narrowest layer has 32 inputs"):
        check_enough(31, 4, plan)
    by_labels = dataclasses.replace(plan, config=dataclasses.replace(CONFIG, token_weighting="labels"))
    with pytest.raises(CalibrationError, match="or count all tokens: token_weighting is 'labels'"):
        check_enough(31, 4, by_labels)


def test_values_that_are_not_finite_are_told_by_batch_and_rank(with_rank):
    with_rank([])
    model = nn.Linear(2, 2)
    error = not_finite_on_ranks(model, "mlp.up", [2, 5])
    assert "the input of mlp.up holds NaN or infinity in calibration batches [2, 5] (rank 0). Look" in str(error)
    with_rank([0])
    assert "in calibration batches [2] (rank 0), calibration batches [0] (rank 1)." in str(
        not_finite_on_ranks(model, "x", [2])
    )
    with_rank([])
    assert "in the sum over all batches." in str(
        not_finite_on_ranks(model, "x", [])
    )  # each finite, and the sum too large


def test_a_models_own_values_that_are_not_finite_are_blamed_before_the_data():
    model = nn.Sequential(nn.Embedding(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model.register_buffer("mask", torch.full((4, 4), float("-inf")))  # which is right
    assert "in batch 3. Look for broken samples" in str(not_finite(model, "2", "batch 3"))
    with torch.no_grad():
        model[0].weight[2, 1] = float("nan")
    assert "the input of 2 holds NaN or infinity, since 0.weight of the model does. Training diverged" in str(
        not_finite(model, "2", "batch 3")
    )
    model[1].running_mean[0] = float("nan")
    assert "since 0.weight, 1.running_mean of the model does" in str(not_finite(model, "2", "batch 3"))


def test_too_few_tokens_are_refused_with_the_number_of_samples_that_is_enough():
    plan = plan_of(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256)))
    with pytest.raises(CalibrationError, match="40 tokens in 40 samples.*nsamples is 16, and 64 like these are"):
        check_enough(40, 40, plan)
    with pytest.raises(CalibrationError, match=r"9 tokens in 2 samples.*and 15 like these are enough"):
        check_enough(9, 2, plan)
    with pytest.raises(CalibrationError, match=r"0 tokens in 2 samples.*\(nsamples is 16\)"):
        check_enough(0, 2, plan)


def test_a_calibration_that_reaches_nothing_names_the_model_and_a_layer():
    error = unreached(plan_of(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))))
    assert isinstance(error, CalibrationError)
    assert "any of the 2 layers to quantize, such as 0: the forward runs other modules than Sequential's" in str(error)


def test_digests_beyond_the_range_of_a_hash_wrap_around(with_rank):
    with_rank((1, 2**256 - 1, "x"))
    one = calibration_of([torch.ones(1, 8)])
    assert count_samples(one).sha256 == f"{one.digest - 1:064x}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_in_any_weight_is_refused_before_the_work(value):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    check_finite(model)
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data.view(-1)[-1] = value
        with pytest.raises(TargetError, match=rf"NaN or infinity in {name} of Sequential"):
            check_finite(model)
        parameter.data = kept
