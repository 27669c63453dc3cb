"""Hessians of several experts, each with the tokens between two ends."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin import distributed
from gptq_plugin.walk import each_hessian, hessian
from gptq_plugin.walk.each_hessian import EachHessian
from gptq_plugin.walk.hessian import Hessian

from kernel_cases import gpu

COUNTS = [(5, 0, 9, 1), (0, 0, 3, 2)]


def batches(n=12, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    for counts in COUNTS:
        x = torch.randn(sum(counts) + 2, n, generator=generator)  # two rows are no expert's
        yield x.to(device, dtype), torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device), counts


def one_each(beside=None, **kind):
    found = []
    for number in range(4):
        own = Hessian(12, kind.get("device", "cpu"))
        for x, _, counts in batches(**kind):
            own.add(x[: sum(counts)].split(list(counts))[number])
        found.append((own.mean(beside), own.tokens))
    return found


def of_all(exact, beside=None, **kind):
    each = EachHessian(4, 12, kind.get("device", "cpu"), exact=exact)
    for x, ends, _ in batches(**kind):
        each.add(x, ends)
    return taken(each, beside)


def taken(each, beside=None):
    """Each expert's mean and tokens, of means that are taken in parts."""
    tokens = each.tokens().tolist()
    return list(zip((*each.take(3, beside), *each.take(1, beside)), tokens, strict=True))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("helped", [True, False])
def test_each_experts_mean_is_that_of_its_tokens(exact, helped):
    beside = torch.eye(12) + 0.1 if helped else None
    for (mean, tokens), (wanted, own) in zip(of_all(exact, beside), one_each(beside), strict=True):
        assert tokens == own
        torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(mean, mean.mT)


def test_exact_sums_are_those_of_one_expert_to_the_bit():
    for (mean, _), (wanted, _) in zip(of_all(True), one_each(), strict=True):
        assert torch.equal(mean, wanted)


@pytest.mark.parametrize("exact", [True, False])
def test_an_expert_may_have_a_single_token(exact):
    each, x = EachHessian(3, 12, "cpu", exact=exact), torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    each.add(x, torch.tensor([1, 1, 3], dtype=torch.int32))
    one, none, two = each.take(3)
    torch.testing.assert_close(one, x[0].outer(x[0]))
    torch.testing.assert_close(two, x[1:].T @ x[1:] / 2)
    assert not none.any()


@pytest.mark.parametrize("exact", [True, False])
def test_wide_experts_have_a_librarys_strips(exact, monkeypatch):
    narrow = of_all(exact)
    monkeypatch.setattr(each_hessian, "_WIDE", 8)
    monkeypatch.setitem(hessian._STRIP, "cpu", 5)
    for (mean, tokens), (wanted, own) in zip(of_all(exact), narrow, strict=True):
        assert tokens == own
        torch.testing.assert_close(mean, wanted)


@pytest.mark.parametrize("exact", [True, False])
def test_sums_and_tokens_are_those_of_all_ranks(exact, monkeypatch):
    monkeypatch.setattr(distributed, "sum_each_", lambda tensors: [tensor.mul_(3) for tensor in tensors])
    each = EachHessian(4, 12, "cpu", exact=exact)
    for x, ends, _ in batches():
        each.add(x, ends)
    each.over_ranks()
    for (mean, tokens), (wanted, own) in zip(taken(each), one_each(), strict=True):
        assert tokens == 3 * own
        torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-6)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_on_a_gpu_each_experts_mean_is_that_of_its_tokens(wide, exact, dtype, monkeypatch):
    monkeypatch.setattr(each_hessian, "_WIDE", 8 if wide else 4096)
    monkeypatch.setitem(hessian._STRIP, "cuda", 5 if wide else 1024)
    kind = {"dtype": dtype, "device": "cuda"}
    for (mean, tokens), (wanted, own) in zip(of_all(exact, **kind), one_each(**kind), strict=True):
        assert tokens == own
        torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-5)


@gpu
def test_on_a_gpu_a_batch_is_added_without_a_wait():
    each, sums = EachHessian(4, 12, "cuda"), list(batches(dtype=torch.bfloat16, device="cuda"))
    each.add(*sums[0][:2])  # compiles the kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        each.add(*sums[1][:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert each.tokens().tolist() == [5, 0, 12, 3]
