"""Drifts of several experts, each with the tokens between two ends, against those of one expert."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin import distributed
from gptq_plugin.walk.drift import MOST, Drift
from gptq_plugin.walk.each_drift import EachDrift

from kernel_cases import gpu

COUNTS = [(5, 0, 9, 1), (0, 0, 3, 2)]
WEIGHTS = torch.tensor([20, 12, 24, 15])


def batches(n=12, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    for counts in COUNTS:
        seen = torch.randn(sum(counts) + 2, n, generator=generator)
        x = seen + 0.2 * torch.randn(seen.shape, generator=generator)
        x[5:14] -= 1.5 * seen[5:14] if counts[0] else 0  # the third expert's have little to do with its inputs
        x[-2:] = seen[-2:] = torch.nan  # rows of none
        ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device)
        yield x.to(device, dtype), seen.to(device, dtype), ends, counts


def one_each(exact=True, **kind):
    drifts = [Drift(kind.get("n", 12), kind.get("device", "cpu"), exact=exact) for _ in range(4)]
    for x, seen, _, counts in batches(**kind):
        each = (rows[: sum(counts)].split(list(counts)) for rows in (x, seen))
        for drift, own, own_seen in zip(drifts, *each, strict=True):
            drift.add(own, own_seen)
    return drifts


def of_all(exact, **kind):
    each = EachDrift(4, kind.get("n", 12), kind.get("device", "cpu"), exact=exact)
    for x, seen, ends, _ in batches(**kind):
        each.add(x, seen, ends)
    return each


def taken(each):
    """By twos, as chunks of experts take them."""
    along = each.along()
    weights = WEIGHTS.to(along.device)
    return torch.cat([each.take(along[some], weights[some]) for some in (slice(0, 2), slice(2, 4))])


@pytest.mark.parametrize(("exact", "dtype"), [(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)])
def test_each_experts_drift_is_that_of_its_tokens(exact, dtype):
    each, wanted = of_all(exact, dtype=dtype), one_each(dtype=dtype)
    assert each.tokens().tolist() == [one.tokens for one in wanted] == [5, 0, 12, 3]
    torch.testing.assert_close(each.along().float(), torch.tensor([one.along() for one in wanted]), rtol=1e-5, atol=0)
    for number, (found, one) in enumerate(zip(taken(each), wanted, strict=True)):
        if number == 2:
            assert one.along() < -MOST and not found.any()
        else:
            torch.testing.assert_close(found, one.mean(int(WEIGHTS[number])), rtol=1e-5, atol=1e-6)
            assert found.any() == (number != 1)


def test_exact_sums_are_those_of_one_expert_to_the_bit():
    for number, (found, one) in enumerate(zip(taken(of_all(True)), one_each(), strict=True)):
        assert number == 2 or torch.equal(found, one.mean(int(WEIGHTS[number])))


def test_exact_sums_and_their_part_along_the_inputs_are_the_same_in_any_order():
    given, found = [batch for _ in range(3) for batch in batches()], []
    for number, (x, seen, _, _) in enumerate(given):
        x *= 1.7**number
        seen *= 1.7**number
    for order in (given, given[::-1]):
        each = EachDrift(4, 12, "cpu")
        for x, seen, ends, _ in order:
            each.add(x.clone(), seen, ends)
        found.append((each.along(), taken(each)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("exact", [True, False])
def test_sums_and_tokens_are_those_of_all_ranks(exact, monkeypatch):
    each, alone = of_all(exact), of_all(exact)
    monkeypatch.setattr(distributed, "sum_each_", lambda tensors: [tensor.mul_(3) for tensor in tensors])
    each.over_ranks()
    assert each.tokens().tolist() == [3 * tokens for tokens in alone.tokens().tolist()]
    torch.testing.assert_close(each.along(), alone.along())
    torch.testing.assert_close(taken(each), 3 * taken(alone))


def test_experts_without_a_token_did_not_drift():
    for exact in (True, False):
        each = EachDrift(4, 12, "cpu", exact=exact)
        assert each.tokens().tolist() == [0] * 4 and not each.along().any() and not taken(each).any()


@gpu
@pytest.mark.parametrize("n", [12, 200, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
def test_on_a_gpu_each_experts_drift_is_that_of_its_tokens(exact, dtype, n):
    kind = {"dtype": dtype, "device": "cuda", "n": n}
    each, wanted = of_all(exact, **kind), one_each(exact, **kind)
    assert each.tokens().tolist() == [one.tokens for one in wanted]
    along = torch.tensor([one.along() for one in wanted])
    torch.testing.assert_close(each.along().float().cpu(), along, rtol=1e-2, atol=1e-3)
    for number, (found, one) in enumerate(zip(taken(each), wanted, strict=True)):
        if number == 2:
            assert not found.any()
        else:
            torch.testing.assert_close(found, one.mean(int(WEIGHTS[number])), rtol=1e-4, atol=1e-5)
