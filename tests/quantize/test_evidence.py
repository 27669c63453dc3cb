"""The evidence that the solver gets for a group of layers."""

from __future__ import annotations

import math

import pytest
import torch
from plans import CONFIG, Listed, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.quantize.evidence import Observations
from gptq_plugin.walk.groups import Group


def observations(model, batches):
    calibration = calibration_of(batches)
    positions = Positions(model, calibration.batches, "all")
    return Observations(plan_of(model), positions, torch.device("cpu"), lambda target: target.weight)


def test_a_groups_evidence_is_the_mean_over_the_tokens_of_all_its_batches():
    x, y = rows(40, 32, seed=1), rows(24, 32, seed=2)
    seen, group = observations(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), [x, y]), Group(("0",))
    seen.observe(group, 0, x)
    seen.observe(Group(("1",)), 0, 5 * x)  # of no concern
    seen.observe(group, 1, y[None])  # whatever its leading sizes
    evidence = seen.of_group(group)
    both = torch.cat([x, y]).double()
    torch.testing.assert_close(evidence.mean.double(), both.T @ both / 64, rtol=1e-5, atol=1e-6)
    assert (evidence.tokens, evidence.damp_percent, evidence.deviations) == (64, 0.0, ())


def test_what_was_observed_is_dropped_with_the_evidence_and_when_discarded():
    x, group = rows(40, 32), Group(("0",))
    seen = observations(nn.Sequential(nn.Linear(32, 32)), [x])
    for drop in (seen.of_group, seen.discard):
        seen.observe(group, 0, x)
        drop(group)
        evidence = seen.of_group(group)
        assert evidence.tokens == 0 and not evidence.mean.any() and evidence.deviations == ()
    seen.discard(group)  # nothing to drop is fine


def test_the_evidence_is_that_of_all_ranks(monkeypatch):
    x, group = rows(20, 32), Group(("0",))
    seen = observations(nn.Sequential(nn.Linear(32, 32)), [x])
    seen.observe(group, 0, x)
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "sum_", lambda message, tokens: message.mul_(3) is not None and tokens + 40)
    evidence = seen.of_group(group)
    assert evidence.tokens == 60 and evidence.deviations == ()
    torch.testing.assert_close(evidence.mean, x.T @ x / 20)


@pytest.mark.parametrize(("tokens", "is_few"), [(1, True), (31, True), (32, False)])
def test_fewer_tokens_than_inputs_are_reported(tokens, is_few):
    x, group = rows(tokens, 32), Group(("0",))
    seen = observations(nn.Sequential(nn.Linear(32, 32)), [x])
    seen.observe(group, 0, x)
    few = (f"only {tokens} calibration tokens for 32 inputs: the Hessian is singular",) if is_few else ()
    assert seen.of_group(group).deviations == few


def test_padding_is_left_out_and_inputs_that_no_mask_fits_are_told_with_the_batches_of_all_ranks(monkeypatch):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batches = [{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask}] * 2
    seen, group = observations(nn.Sequential(nn.Linear(32, 32)), batches), Group(("0",))
    padded = rows(8, 32).view(2, 4, 32)
    seen.observe(group, 0, padded)
    counted = padded[mask.bool()]
    evidence = seen.of_group(group)
    assert evidence.tokens == 5
    torch.testing.assert_close(evidence.mean, counted.T @ counted / 5)
    for number in (0, 1):
        seen.observe(group, number, rows(3 * 32, 32).view(3, 32, 32))
    evidence = seen.of_group(group)
    assert evidence.tokens == 2 * 96
    assert evidence.deviations == ()
    told = seen.remarks()
    assert (
        list(told) == ["0"] and len(told["0"]) == 1 and told["0"][0].endswith("all its positions counted (2 batches)")
    )
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, own, {("other", "odd"): 1}])
    assert seen.remarks() == {"0": (told["0"][0].replace("(2 ", "(4 "),), "other": ("odd (1 batches)",)}


def test_every_position_counts_for_the_range_of_inputs():
    mask = torch.tensor([[1, 0]])
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": mask}
    seen = observations(nn.Sequential(nn.Linear(32, 32)), [batch])
    x = torch.zeros(1, 2, 32)
    x[0, 1, 3] = -7.0  # padding
    seen.observe(Group(("0",)), 0, x)
    largest, output = seen.ranges.over_ranks(["0"], torch.device("cpu"))["0"]
    assert largest == 7.0 and math.isnan(output)


@pytest.fixture
def routed():
    """Experts, of which a batch of 300 tokens went through all but the last; what was seen of them; the tokens."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Listed()), rows(300, 32)
    calibration = calibration_of([x])
    positions, plan = Positions(model, calibration.batches, CONFIG.token_weighting), plan_of(model)
    seen = Observations(plan, positions, torch.device("cpu"), lambda target: target.weight)

    def reads(name, _, args):
        seen.observe(Group((name,)), 0, args[0])

    handles = [
        target.module.register_forward_pre_hook(
            lambda _, args, name=target.name: seen.observe(Group((name,)), 0, *args)
        )
        for target in plan.targets
    ]
    with positions.watching(seen.observe_experts), positions.running(0), torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return {target.name: target for target in plan.targets}, seen, x


def test_an_expert_takes_its_own_tokens_and_those_of_its_block(routed):
    _, seen, x = routed
    whole = x.T @ x / len(x)
    evidence = seen.of_group(Group(("0.experts.0.0",)))
    n = evidence.tokens
    assert 32 < n < len(x)
    own = (evidence.mean * (n + 32) - whole * 32) / n
    chosen = torch.linalg.eigvalsh(own)
    assert chosen.min() > -1e-3  # a mean of x xᵀ again
    assert not torch.allclose(evidence.mean, whole, rtol=0.01)


def test_an_expert_that_no_token_reached_takes_all_tokens_of_its_block(routed):
    targets, seen, x = routed
    seen.of_group(Group(("0.experts.0.0",)))  # shows that such layers read tokens
    evidence = seen.of_unreached("0.experts", targets["0.experts.3.0"])
    assert evidence.tokens == 0
    torch.testing.assert_close(evidence.mean, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    behind = seen.of_unreached("0.experts", targets["0.experts.3.2"])  # reads what only this expert makes of tokens
    assert behind.tokens == 0 and not behind.mean.any() and behind.damp_percent == 0.9


def test_the_tokens_of_a_block_are_dropped_when_the_walk_leaves_it(routed):
    targets, seen, _ = routed
    seen.of_group(Group(("0.experts.0.0",)))
    seen.leave("0.experts")
    evidence = seen.of_unreached("0.experts", targets["0.experts.3.0"])
    assert not evidence.mean.any()
