"""Hessians of experts that see few tokens: what the whole layer's tokens add to them."""

from __future__ import annotations

import itertools

import pytest
import torch

from gptq_plugin import distributed
from gptq_plugin.walk import each_drift as sums_of_drifts
from gptq_plugin.walk import each_hessian as sums_of_hessians
from gptq_plugin.walk.each_drift import EachDrift
from gptq_plugin.walk.each_hessian import EachHessian
from gptq_plugin.walk.expert_hessians import Evidence, ExpertHessians
from gptq_plugin.walk.hessian import Hessian

from kernel_cases import gpu

CPU = torch.device("cpu")
WIDTH = 6


def rows(count, width=WIDTH, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_of(x):
    hessian = Hessian(x.shape[1], "cpu", torch.float64)
    hessian.add(x)
    return hessian


def mean(x):
    return x.T @ x / len(x)


@pytest.mark.parametrize("tokens", [1, WIDTH - 1, WIDTH, 40])
def test_layers_that_read_tokens_take_as_many_of_the_whole_layer_as_they_have_inputs(tokens):
    experts, own = ExpertHessians(CPU), rows(tokens)
    everything = [own, rows(50, seed=1)]
    for part in everything:
        experts.entered("mlp.experts", part)
    evidence = experts.weighted("mlp.experts", True, hessian_of(own))
    expected = (own.T @ own + WIDTH * mean(torch.cat(everything))) / (tokens + WIDTH)
    torch.testing.assert_close(evidence.mean, expected, rtol=1e-5, atol=1e-5)
    assert (evidence.tokens, evidence.damp_percent) == (tokens, 0.0)
    few = f"only {tokens} calibration tokens were routed to this expert, for 6 inputs: all tokens of the layer are"
    assert [deviation.startswith(few) for deviation in evidence.deviations] == [True] * (tokens < WIDTH)


@pytest.mark.parametrize(
    ("tokens", "damp_percent"), [(0, 0.9), (1, 0.9), (3, 0.3 * 2**1.5), (6, 0.3), (24, 0.3 / 8), (600, 0.0003)]
)
def test_layers_behind_those_get_more_damping_the_fewer_tokens_they_have(tokens, damp_percent):
    experts, own = ExpertHessians(CPU), Hessian(WIDTH, "cpu", torch.float64)
    own.add(rows(tokens))
    experts.entered("mlp.experts", rows(50, seed=1))
    evidence = experts.weighted("mlp.experts", False, own)
    assert torch.equal(evidence.mean, own.mean()) and evidence.tokens == tokens
    assert evidence.damp_percent == pytest.approx(damp_percent)
    said = (f"only {tokens} calibration tokens were routed to this expert, for 6 inputs: damp_percent is "
            f"{damp_percent:.2g}",)  # fmt: skip
    assert evidence.deviations == (said if tokens < WIDTH else ())


def test_the_most_damping_is_less_than_the_bound_of_damp_percent():
    experts = ExpertHessians(CPU)
    assert 0.8 < experts.weighted("a", False, hessian_of(rows(1, 512))).damp_percent < 1


def test_tokens_of_another_width_and_of_no_block_are_not_weighted_in():
    experts, own = ExpertHessians(CPU), hessian_of(rows(3))
    experts.entered("wide", rows(50, WIDTH + 1))
    for name in ("wide", "never entered"):
        evidence = experts.weighted(name, True, own)
        assert torch.equal(evidence.mean, own.mean()) and evidence.damp_percent == pytest.approx(0.3 * 2**1.5)


def test_blocks_are_kept_apart_and_forgotten_when_the_walk_leaves_them():
    experts, own = ExpertHessians(CPU), hessian_of(rows(3))
    everything = {"one": rows(20, seed=1), "other": rows(20, seed=2) * 5}
    for name, x in everything.items():
        experts.entered(name, x)
    for name, x in everything.items():
        for _ in range(2):  # each of the block's layers asks
            expected = (own.mean() * 3 + WIDTH * mean(x)) / (3 + WIDTH)
            torch.testing.assert_close(experts.weighted(name, True, own).mean, expected, rtol=1e-5, atol=1e-5)
    experts.leave("one")
    assert experts.weighted("one", True, own).damp_percent > 0  # nothing is known of it any more
    assert experts.weighted("other", True, own).damp_percent == 0
    experts.entered("late", rows(20))
    experts.leave("late")
    assert experts.weighted("late", True, own).damp_percent > 0


def test_whether_layers_read_tokens_is_asked_of_all_ranks_once(monkeypatch):
    experts, told = ExpertHessians(CPU), []

    def gather_objects(value):
        """The other rank saw the first block's gate read tokens."""
        told.append(value)
        return [value, len(told) == 1]

    monkeypatch.setattr(distributed, "gather_objects", gather_objects)
    assert experts.reads_tokens("a", ["gate", "up"], False)
    assert experts.reads_tokens("a", ["up"], False) and experts.reads_tokens("a", ["gate"], False)
    assert not experts.reads_tokens("a", ["down"], False)
    assert experts.reads_tokens("b", ["down"], True) and not experts.reads_tokens("b", ["gate"], False)
    assert told == [False, False, True, False]


def test_a_rank_whose_tokens_went_elsewhere_takes_those_of_the_others(monkeypatch):
    experts, own, others = ExpertHessians(CPU), hessian_of(rows(3)), hessian_of(rows(20, seed=1).float())
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "gather_objects", lambda width: [width, WIDTH])

    def sum_(message, tokens):
        message += others._sum
        return tokens + others.tokens

    monkeypatch.setattr(distributed, "sum_", sum_)
    evidence = experts.weighted("mlp.experts", True, own)
    expected = (own.mean() * 3 + others.mean() * WIDTH) / (3 + WIDTH)
    torch.testing.assert_close(evidence.mean, expected, rtol=1e-5, atol=1e-5)


def test_sums_live_on_the_device_that_was_given():
    experts, own = ExpertHessians(CPU), hessian_of(rows(3))
    tokens = torch.ones(2, WIDTH)
    with torch.device("meta"):
        experts.entered("a", tokens)
        evidence = experts.weighted("a", True, own)
    torch.testing.assert_close(evidence.mean, (own.mean() * 3 + torch.ones(WIDTH, WIDTH) * WIDTH) / 9)


def test_evidence_is_complete_with_a_mean_and_a_count():
    evidence = Evidence(torch.zeros(2, 2), 3)
    assert (evidence.damp_percent, evidence.deviations) == (0.0, ())


@pytest.mark.parametrize("options, same", [({}, True), ({"exact": True}, True), ({"exact": False}, False)])
def test_tokens_are_summed_exactly_unless_it_is_asked_otherwise(options, same):
    parts, own, means = [rows(40, seed=seed).float() * 10.0**seed for seed in range(4)], hessian_of(rows(3)), []
    for order in (parts, parts[::-1]):
        experts = ExpertHessians(CPU, **options)
        for part in order:
            experts.entered("a", part)
        means.append(experts.weighted("a", True, own).mean)
    assert torch.equal(*means) == same


@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_without_tokens_sums_in_the_type_of_the_others(monkeypatch, exact):
    messages = []
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "gather_objects", lambda width: [width, WIDTH])
    monkeypatch.setattr(distributed, "sum_", lambda message, tokens: messages.append(message.dtype) or 1)
    ExpertHessians(CPU, exact).weighted("a", True, hessian_of(rows(3)))
    assert messages == [torch.float64 if exact else torch.float32]


def test_one_token_and_narrow_layers_are_weighted_like_others():
    experts = ExpertHessians(CPU)
    assert experts.weighted("a", False, hessian_of(rows(1, 2))).damp_percent == pytest.approx(0.3 * 2**1.5)
    own = hessian_of(rows(3, 1))
    evidence = experts.weighted("never entered", True, own)
    assert torch.equal(evidence.mean, own.mean())


COUNTS = (0, 2, WIDTH - 1, 40)


def each_hessian(own, device="cpu", *, exact):
    each = EachHessian(len(own), WIDTH, device, exact=exact)
    ends = torch.tensor([len(one) for one in own]).cumsum(0, dtype=torch.int32)
    each.add(torch.cat(own).float().to(device), ends.to(device))
    return each


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("reads_tokens", [True, False])
def test_the_evidence_of_experts_together_is_that_of_each(reads_tokens, exact):
    experts, own = ExpertHessians(CPU), [rows(count, seed=count) for count in COUNTS]
    experts.entered("mlp.experts", rows(50, seed=1))
    found = experts.weighted_each("mlp.experts", reads_tokens, each_hessian(own, exact=exact))
    parts = [found.take(3), found.take(1)]
    each = [one for part in parts for one in part.each()]
    damp_percents = [one for part in parts for one in part.damp_percents.tolist()]
    for rows_of_one, one, damp_percent in zip(own, each, damp_percents, strict=True):
        hessian = Hessian(WIDTH, "cpu")
        hessian.add(rows_of_one.float())
        wanted = experts.weighted("mlp.experts", reads_tokens, hessian)
        torch.testing.assert_close(one.mean, wanted.mean, rtol=1e-5, atol=1e-6)
        assert (one.tokens, one.damp_percent, one.deviations) == (
            len(rows_of_one),
            wanted.damp_percent,
            wanted.deviations,
        )
        assert damp_percent == pytest.approx(one.damp_percent, rel=1e-12)


def each_drift(own, device="cpu", *, exact, away=0.1):
    """The third expert's inputs have little to do with those of the float model, and one of the fourth's is unknown."""
    drift, own = EachDrift(len(own), WIDTH, device, exact=exact), [*own[:3], own[3][1:]]
    ends = torch.tensor([len(one) for one in own]).cumsum(0, dtype=torch.int32)
    seen = torch.cat(own).float()
    x = seen + away * seen.roll(1, 1)
    x[ends[1] : ends[2]] = -seen[ends[1] : ends[2]]
    drift.add(x.to(device), seen.to(device), ends.to(device))
    return drift


@pytest.mark.parametrize("exact", [True, False])
def test_drifts_of_experts_together_are_those_of_each(exact):
    experts, own = ExpertHessians(CPU), [rows(count, seed=count) for count in COUNTS]
    hessians, drift = each_hessian(own, exact=exact), each_drift(own, exact=exact)
    found = experts.weighted_each("mlp.experts", False, hessians, drift, [True, False, True, True])
    some = [found.take(1), found.take(3)]
    drifts = torch.cat([part.drifts for part in some])
    none, unasked, unrelated, fourth = [one for part in some for one in part.each()]
    for number, one in ((0, none), (2, unrelated)):
        assert one.drift is None or not one.drift.any()
        assert not drifts[number].any()
    assert unasked.drift is None and "asymmetric_alpha" not in str((none.deviations, unasked.deviations))
    assert "its inputs have little to do with the float model's" in unrelated.deviations[-1]
    assert fourth.deviations == ("1 of 40 tokens have no counterpart in the float model: taken as not drifted",)
    seen = own[3][1:].float()
    torch.testing.assert_close(fourth.drift, 0.1 * seen.roll(1, 1).T @ seen / (40 + WIDTH), rtol=1e-4, atol=1e-5)
    assert torch.equal(fourth.drift, drifts[3])


def test_that_drift_is_asked_for_and_not_paired_is_told_of_experts_with_tokens():
    own = [rows(count, seed=count) for count in COUNTS]
    found = ExpertHessians(CPU).weighted_each("mlp.experts", False, each_hessian(own, exact=True), None, [True] * 4)
    some = found.take(4)
    assert some.drifts is None
    told = ["the expert gets other tokens in the float model" in str(one.deviations) for one in some.each()]
    assert told == [False, True, True, True]


def scarce(monkeypatch, owner, name, call):
    """There is no room for this call."""
    follows, calls = getattr(owner, name), itertools.count()

    def failing(*args, **options):
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return follows(*args, **options)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("call", [0, 1])  # the block's mean, and the expert's
def test_a_mean_that_finds_no_room_is_made_again(call, monkeypatch):
    freed, found = [], []
    for make_room in (lambda: False, lambda: not freed.append(1)):
        experts = ExpertHessians(CPU, make_room=make_room)
        experts.entered("a", rows(50, seed=1))
        found.append(experts.weighted("a", True, hessian_of(rows(3))).mean)
        scarce(monkeypatch, Hessian, "mean", call)
    assert freed == [1] and torch.equal(*found)


@pytest.mark.parametrize("place", [(sums_of_hessians, "whole"), (sums_of_drifts, "_narrowed")])
def test_means_of_experts_together_that_find_no_room_are_made_again(place, monkeypatch):
    freed, found, own = [], [], [rows(count, seed=count) for count in COUNTS]
    for make_room in (lambda: False, lambda: not freed.append(1)):
        experts = ExpertHessians(CPU, make_room=make_room)
        sums = each_hessian(own, exact=True), each_drift(own, exact=True)
        each = experts.weighted_each("a", False, *sums, [True] * 4)
        if found:
            scarce(monkeypatch, *place, 0)
        some = each.take(4)
        found.append(torch.cat([some.means, some.drifts]))
    assert freed == [1] and torch.equal(*found)


@gpu
@pytest.mark.parametrize("exact", [True, False])
def test_on_a_gpu_nothing_waits_until_one_asks_for_the_evidence_of_each(exact):
    experts, own = ExpertHessians(torch.device("cuda")), [rows(count, seed=count) for count in COUNTS]
    each, drift = each_hessian(own, "cuda", exact=exact), each_drift(own, "cuda", exact=exact)
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = experts.weighted_each("mlp.experts", False, each, drift, [True] * 4)
        some = found.take(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [one.tokens for one in some.each()] == list(COUNTS)
    assert [one.drift is None for one in some.each()] == [True, False, True, False]  # no tokens; unrelated ones
