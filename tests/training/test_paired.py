"""Paired bootstrap of a metric's change: against the classical interval, and how often it holds the truth."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from gptq_plugin.training import paired
from gptq_plugin.training.paired import Draws, Measured, same_parts, spread, unpaired
from gptq_plugin.training.samples import Part, Samples


def metric(values, weights=None, keys=None):
    return Measured.mean([float(v) for v in values], weights or [1.0] * len(values), keys)


def pairs(parts, seed, noise=0.1, change=0.05):
    """Float values that differ much from each other, and quantized ones that are a little worse."""
    g = torch.Generator().manual_seed(seed)
    before = 3 + torch.randn(parts, generator=g, dtype=torch.float64)
    return before, before + change + noise * torch.randn(parts, generator=g, dtype=torch.float64)


def test_a_metric_is_a_number_with_the_values_it_is_the_mean_of():
    one = metric([1.0, 2.0, 6.0], [1, 1, 2], [7, 8, 9])
    assert one == 3.75 and one.values == [1.0, 2.0, 6.0] and isinstance(one, float)
    again = pickle.loads(pickle.dumps(one))  # between ranks
    assert again == one and (again.values, again.weights, again.keys) == ([1.0, 2.0, 6.0], [1, 1, 2], [7, 8, 9])
    assert math.isnan(metric([1.0], [0.0]))


def test_a_metric_of_all_ranks_is_over_their_parts_and_knows_their_samples():
    one, other = ([Part(value, 2, 0, key)] for value, key in ((1.0, 7), (torch.tensor(4.0), 8)))
    ranks = [Samples([], 3), Samples([], 4, "a sample failed"), None]
    found = Measured.over_ranks(zip((one, other, []), ranks, strict=True))
    assert (found, found.values, found.weights, found.keys) == (2.5, [1.0, 4.0], [2, 2], [7, 8])
    assert (found.samples.total, found.samples.why) == (7, "a sample failed")
    assert Measured.over_ranks([(one, None)]).samples is None
    outside = Measured.over_ranks([([*one, Part(4.0, 1, None)], None)])
    assert outside == 2.0 and type(outside) is float and math.isnan(Measured.over_ranks([([], None)]))


def test_of_paired_values_only_the_differences_count():
    """The interval is that of the mean difference, and not of two independent means, which is ten times as wide."""
    before, after = pairs(200, seed=0)
    found = spread(metric(before), metric(after))
    difference = after - before
    error = float(difference.std()) / 200**0.5
    assert found.low == pytest.approx(float(difference.mean()) - 1.972 * error, abs=0.1 * error)
    assert found.high == pytest.approx(float(difference.mean()) + 1.972 * error, abs=0.1 * error)
    assert found.margin == pytest.approx(1.972 * error, rel=0.05) and found.parts == 200
    assert found.relative_low < float(difference.mean() / before.mean()) < found.relative_high
    assert found.relative_margin == pytest.approx(found.margin / float(before.mean()), rel=0.1)


@pytest.mark.parametrize(("parts", "noise"), [(10, "normal"), (40, "normal"), (40, "skewed")])
def test_a_bound_holds_as_often_as_it_should(parts, noise):
    """Of 95 % upper bounds of the change, measured on new data each time, 95 % are above the true change."""
    held, trials = 0, 600
    g = torch.Generator().manual_seed(parts)
    for _ in range(trials):
        before = 3 + torch.randn(parts, generator=g, dtype=torch.float64)
        drawn = torch.randn(parts, generator=g, dtype=torch.float64)
        wrong = drawn if noise == "normal" else (drawn.exp() - math.exp(0.5)) / 2
        draws = Draws.of(metric(before), metric(before + 0.05 + 0.1 * wrong))
        held += draws.bound(lambda old, new: new - old, 0.95) >= 0.05
    error = (0.95 * 0.05 / trials) ** 0.5
    least = 0.95 - 3 * error if noise == "normal" else 0.84  # a long upper tail is missed by small samples
    assert least <= held / trials <= 0.95 + 3 * error


@pytest.mark.parametrize(
    ("confidence", "normal", "students"),
    [(0.95, 1.644854, {10: 1.833113, 41: 1.683851}), (0.99, 2.326348, {10: 2.821438, 41: 2.423257})],
)
def test_draws_of_few_parts_are_widened_by_students_t_and_their_missing_deviation(confidence, normal, students):
    """Of draws the deviation is that of the parts over their number, not over one less."""
    for parts, quantile in students.items():
        expected = quantile / normal * math.sqrt(parts / (parts - 1))
        assert paired._widening(confidence, parts) == pytest.approx(expected, rel=1e-3)
        assert paired._widening(1 - confidence, parts) == pytest.approx(expected, rel=1e-3)
    assert paired._widening(0.5, 10) == 1.0


def test_parts_count_by_their_weights_and_draws_are_the_same_every_time():
    before, after = pairs(50, seed=1)
    weights = [1.0 + n % 5 for n in range(50)]
    one, two = metric(before, weights), metric(after, weights)
    draws = Draws.of(one, two)
    assert torch.equal(draws.before, Draws.of(one, two).before)
    assert float(draws.before.mean()) == pytest.approx(one, rel=1e-2) and draws.before.shape == (4000,)
    state = torch.get_rng_state()
    spread(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    last = [0.0] * 19 + [10.0]
    even, heavy = (spread(metric([0.0] * 20, of), metric(last, of)) for of in ([1.0] * 20, [1.0] * 19 + [4.0]))
    assert heavy.high > even.high  # the part that differs is a larger share of the mean


def test_the_same_values_have_no_spread_and_of_zero_there_is_no_share():
    one = metric([1.0, 2.0] * 10)
    found = spread(one, one)
    assert found.low == found.high == found.margin == found.relative_margin == 0
    zero = metric([0.0] * 20)
    found = spread(zero, metric([1.0] * 20))
    assert found.low == found.high == 1.0 and math.isnan(found.relative_low) and math.isnan(found.relative_margin)
    for before in ([-1.0, 1.0] * 10, [1.0] + [0.0] * 19):  # a mean of zero; draws of zeros alone
        found = spread(metric(before), metric([value + 1 for value in before]))
        assert math.isnan(found.relative_low) and math.isnan(found.relative_high)


def test_of_a_metric_below_zero_the_share_has_the_signs_of_the_change():
    before, after = pairs(40, seed=3)
    found = spread(metric(-before), metric(-before + (after - before)))
    assert 0 < found.low < found.high and 0 < found.relative_low < found.relative_high


def test_many_parts_are_drawn_in_pieces(monkeypatch):
    before, after = pairs(30, seed=2)
    whole = spread(metric(before), metric(after))
    monkeypatch.setattr("gptq_plugin.training.paired._AT_ONCE", 30 * 7)
    sizes = [len(drawn) for drawn in paired._drawn(30)]
    assert sum(sizes) == 4000 and max(sizes) == 7
    pieces = spread(metric(before), metric(after))
    assert pieces.margin == pytest.approx(whole.margin, rel=0.05)


def test_what_cannot_be_paired_has_no_spread():
    enough = metric([1.0] * 10)
    assert unpaired(enough, enough) == "" and spread(enough, enough) is not None
    assert spread(1.0, enough) is spread(enough, 1.0) is None
    assert spread(metric([1.0] * 9), metric([1.0] * 9)) is None
    keyed, other = metric([1.0] * 10, keys=[*range(10)]), metric([1.0] * 10, keys=[*range(1, 11)])
    assert not same_parts(keyed, other) and spread(keyed, other) is None
    assert not same_parts(enough, metric([1.0] * 10, [1.0] * 9 + [2.0]))
    broken = metric([1.0] * 9 + [math.inf])
    assert spread(enough, broken) is spread(broken, enough) is None
