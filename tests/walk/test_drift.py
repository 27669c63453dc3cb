"""The drift of a layer's inputs: exact sums of (x − x̂) x̂ᵀ, over parts and over ranks."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin import distributed
from gptq_plugin.walk import drift as drifts
from gptq_plugin.walk.drift import Drift, takes_outputs


def inputs(tokens=50, n=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    seen = torch.randn(tokens, n, generator=g) * torch.logspace(-2, 2, n)
    return seen + 0.1 * torch.randn(tokens, n, generator=g), seen


@pytest.mark.parametrize("n", [1, 7, 20, 32])
@pytest.mark.parametrize("exact", [True, False])
def test_the_mean_is_that_of_the_products_over_the_tokens_asked_for(n, exact, monkeypatch):
    monkeypatch.setattr(drifts, "_STRIP", 8)
    x, seen = inputs(n=n)
    drift = Drift(n, "cpu", exact=exact)
    for part in (slice(0, 13), slice(13, 50), slice(0, 0)):
        drift.add(x[part], seen[part])
    wanted = (x - seen).double().T @ seen.double()
    assert drift.tokens == 50 and drift.mean(50).dtype == torch.float32
    size = wanted.norm()
    assert (drift.mean(50).double() * 50 - wanted).norm() < 1e-5 * size
    assert (drift.mean(80).double() * 80 - wanted).norm() < 1e-5 * size  # tokens without a partner did not drift
    assert not Drift(n, "cpu", exact=exact).mean(0).any()


@pytest.mark.parametrize("exact", [True, False])
def test_with_a_weight_the_mean_is_that_of_the_outputs(exact, monkeypatch):
    monkeypatch.setattr(drifts, "_STRIP", 4)
    (x, seen), weight = inputs(), torch.randn(9, 20, generator=torch.Generator().manual_seed(1))
    drift = Drift(20, "cpu", exact=exact, rows=9)
    for part in (slice(0, 13), slice(13, 50), slice(0, 0)):
        drift.add(x[part], seen[part], weight)
    wanted = weight.double() @ (x - seen).double().T @ seen.double() / 50
    assert drift.mean(50).shape == (9, 20)
    assert (drift.mean(50).double() - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("exact", [True, False])
def test_the_share_along_the_inputs_is_that_of_the_tokens_that_are_sampled(rows, exact, monkeypatch):
    monkeypatch.setattr(drifts, "_SAMPLED", 6)  # every second one of 13, every sixth of 37
    (x, seen), weight = inputs(), torch.randn(9, 20)
    drift = Drift(20, "cpu", exact=exact, rows=rows)
    assert drift.along() == 0
    for part in (slice(0, 13), slice(13, 50)):
        drift.add(x[part], seen[part], weight if rows else None)
    some = [*range(0, 13, 2), *range(13, 50, 6)]
    wanted = ((x - seen) * seen)[some].sum() / seen[some].square().sum()
    assert drift.along() == pytest.approx(float(wanted), rel=1e-4)


def test_outputs_are_taken_where_that_saves_work():
    assert takes_outputs(4096, 14336) and takes_outputs(32, 64)
    assert not takes_outputs(4096, 4096) and not takes_outputs(33, 64)


@pytest.mark.parametrize("weight", [None, torch.randn(9, 20, generator=torch.Generator().manual_seed(1))])
def test_sums_are_the_same_to_the_bit_in_any_order(weight):
    parts = [inputs(tokens=10 + number, seed=number) for number in range(9)]
    found = []
    for order in (range(9), reversed(range(9)), (4, 2, 8, 0, 1, 7, 3, 5, 6)):
        drift = Drift(20, "cpu", rows=0 if weight is None else len(weight))
        for number in order:
            drift.add(*parts[number], weight)
        found.append(drift.total)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_drift_that_is_small_beside_the_inputs_is_as_exact_as_a_large_one():
    _, seen = inputs()
    x = seen + 1e-5 * seen.roll(1, 0)
    drift = Drift(20, "cpu")
    drift.add(x, seen)
    wanted = (x - seen).double().T @ seen.double() / 50
    scale = ((x - seen).double().square().mean(0)[:, None] * seen.double().square().mean(0)).sqrt()
    assert ((drift.mean(50).double() - wanted).abs() / scale).max() < 1e-6


def test_ranks_add_up_their_sums(monkeypatch):
    drift = Drift(20, "cpu")
    drift.add(*inputs())
    alone = drift.mean(50)
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "sum_", lambda message, tokens: message.mul_(3) is not None and 3 * tokens)
    drift.over_ranks()
    assert drift.tokens == 150
    torch.testing.assert_close(drift.mean(50), 3 * alone)


def test_what_did_not_drift_is_exactly_zero_in_16_bits_too():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs()[0].to(dtype)
        drift = Drift(20, "cpu")
        drift.add(x, x.clone())
        assert not drift.mean(50).any()
        drift.add(2 * x, x)
        torch.testing.assert_close(drift.mean(50), x.float().T @ x.float() / 50)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
def test_a_gpus_drift_is_as_exact_as_the_inputs_dtype(dtype, exact):
    seen = torch.randn(4096, 1100, device="cuda").to(dtype)
    x = (seen.float() + 0.2 * torch.randn(4096, 1100, device="cuda") + 0.1 * seen.float()).to(dtype)
    drift = Drift(1100, "cuda", exact=exact)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for part in (slice(0, 1500), slice(1500, 4096)):
            drift.add(x[part], seen[part])
    wanted = (x.double() - seen.double()).T @ seen.double() / 4096
    assert (drift.mean(4096).double() - wanted).norm() / wanted.norm() < 1e-3
    weight = torch.randn(300, 1100, device="cuda").to(dtype)
    drift = Drift(1100, "cuda", exact=exact, rows=300)
    for part in (slice(0, 1500), slice(1500, 4096)):
        drift.add(x[part], seen[part], weight)
    wanted = weight.double() @ wanted
    assert (drift.mean(4096).double() - wanted).norm() / wanted.norm() < (2e-3 if dtype == torch.float32 else 1e-2)
