"""Hessians of a layer's inputs: exact sums at every dtype, over parts and over ranks."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin import distributed
from gptq_plugin.walk import hessian as hessians
from gptq_plugin.walk.hessian import Hessian


def test_a_16_bit_hessian_equals_the_one_of_its_upcast_inputs_even_under_autocast():
    x = torch.randn(40, 16).to(torch.bfloat16)
    wide, narrow = Hessian(16, "cpu"), Hessian(16, "cpu")
    wide.add(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow.add(x)
    assert torch.equal(wide.mean(), narrow.mean()) and narrow.mean().dtype == torch.float32
    torch.testing.assert_close(wide.mean(), x.float().T @ x.float() / 40)


@pytest.mark.parametrize("n", [1, 7, 8, 20, 32])
def test_the_mean_is_that_of_the_whole_product_though_half_of_it_is_computed(n, monkeypatch):
    monkeypatch.setattr(hessians, "_STRIP", {"cpu": 8})
    x = torch.randn(50, n, dtype=torch.float64)
    hessian = Hessian(n, "cpu", torch.float64)
    for part in x.split(13):
        hessian.add(part)
    torch.testing.assert_close(hessian.mean(), x.T @ x / 50)
    torch.testing.assert_close(hessian.mean(), x.T @ x / 50)  # asking does not change it
    assert hessian.mean().dtype == torch.float64 and hessian.tokens == 50
    assert torch.equal(Hessian(n, "cpu").mean(), torch.zeros(n, n))


@pytest.mark.parametrize("n", [1, 20, 32])
def test_products_may_be_added_as_they_come(n, monkeypatch):
    monkeypatch.setattr(hessians, "_STRIP", {"cpu": 8})
    x = 3 * torch.randn(50, n)
    hessian, exact = Hessian(n, "cpu", exact=False), Hessian(n, "cpu")
    for part in x.split(13):
        hessian.add(part)
        exact.add(part)
    assert hessian._sum.dtype == torch.float32 and exact._sum.dtype == torch.float64
    torch.testing.assert_close(hessian.mean(), x.T @ x / 50)
    torch.testing.assert_close(hessian.mean(), exact.mean())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
def test_a_gpus_sum_is_exact_up_to_float32_rounding_at_every_dtype(dtype, exact):
    x = torch.randn(4096, 1100, device="cuda").to(dtype)
    hessian = Hessian(1100, "cuda", exact=exact)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for part in x.split(1500):
            hessian.add(part)
    wanted = x.double().T @ x.double() / 4096
    assert (hessian.mean().double() - wanted).norm() / wanted.norm() < 1e-4  # 16-bit sums: 2e-3


def test_hessians_of_parts_add_up_to_the_hessian_of_the_whole():
    x = torch.randn(30, 8, dtype=torch.float64)
    whole, a, b = (Hessian(8, "cpu", torch.float64) for _ in range(3))
    whole.add(x)
    a.add(x[:13])
    b.add(x[13:])
    torch.testing.assert_close(30 * whole.mean(), 13 * a.mean() + 17 * b.mean())
    assert whole.tokens == a.tokens + b.tokens == 30


def test_a_hessian_of_one_token_is_its_outer_product():
    hessian = Hessian(3, "cpu")
    hessian.add(torch.tensor([[1.0, 2.0, 3.0]]))
    assert hessian.tokens == 1 and hessian.mean().tolist() == [[1, 2, 3], [2, 4, 6], [3, 6, 9]]


def test_a_hessian_lives_where_it_was_asked_for():
    mean = Hessian(5, "meta").mean()
    assert mean.device.type == "meta" and mean.dtype == torch.float32
    with torch.device("meta"):
        assert Hessian(5, "cpu").mean().device.type == "cpu"


def uneven(n):
    """24 inputs of other sizes, lengths and channels each, as batches of several sources and experts have them."""
    g = torch.Generator().manual_seed(n)
    scales = torch.logspace(-3, 3, n)[torch.randperm(n, generator=g)]
    return [
        torch.randn(1 + 5 * number, n, generator=g) * scales * 3.0 ** (number % 5 - 2) + 0.1 * scales
        for number in range(24)
    ]


@pytest.mark.parametrize("n", [1, 7, 300])
def test_the_sum_is_the_same_to_the_bit_in_any_order_and_on_any_number_of_ranks(n, monkeypatch):
    inputs, means = uneven(n), []
    for size in (1, 2, 3, 24):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(size)).tolist()
        ranks = [Hessian(n, "cpu") for _ in range(size)]
        for number in order:
            ranks[number % size].add(inputs[number])
        total = ranks[0]
        monkeypatch.setattr(distributed, "active", lambda size=size: size > 1)

        def sum_(message, tokens, others=ranks[1:]):
            for one in others:
                message += one._sum
            return tokens + sum(one.tokens for one in others)

        monkeypatch.setattr(distributed, "sum_", sum_)
        total.over_ranks()
        means.append(total.mean())
        assert total.tokens == sum(map(len, inputs))
    assert all(torch.equal(mean, means[0]) for mean in means)
    floats = torch.zeros(n, n)
    for x in inputs:
        floats += x.T @ x
    exact = sum(x.double().T @ x.double() for x in inputs)
    off, plain = (found.double() - exact for found in (means[0] * total.tokens, floats))
    scale = exact.diagonal().sqrt()
    assert (off / scale / scale[:, None]).abs().max() < 2 * (plain / scale / scale[:, None]).abs().max() + 1e-7


def test_float32_sums_would_depend_on_the_order():
    """Else the test above would hold of anything."""
    products = [x.T @ x for x in uneven(7)]
    assert not torch.equal(sum(products), sum(reversed(products)))


@pytest.mark.parametrize("n", [5, 20])
def test_the_hessians_of_all_ranks_add_up_in_one_message(n, monkeypatch):
    monkeypatch.setattr(hessians, "_STRIP", {"cpu": 8})
    x = torch.randn(30, n, dtype=torch.float64)
    whole, mine, other = (Hessian(n, "cpu", torch.float64) for _ in range(3))
    for hessian, part in ((whole, x), (mine, x[:13]), (other, x[13:])):
        hessian.add(part)
    sent: list[tuple[torch.Tensor, int]] = []

    def sum_(message, tokens):
        """As if the rank that called before were the other one."""
        sent.append((message.clone(), tokens))
        message += sum(earlier for earlier, _ in sent[:-1])
        return sum(count for _, count in sent)

    monkeypatch.setattr(distributed, "sum_", sum_)
    other.over_ranks()
    assert not sent  # it is alone
    monkeypatch.setattr(distributed, "active", lambda: True)
    other.over_ranks()
    mine.over_ranks()
    torch.testing.assert_close(mine.mean(), whole.mean())
    assert mine.tokens == 30 and len(sent) == 2
    assert n < 8 or sent[0][0].numel() < n * n  # without the symmetric half


def test_a_cpus_strips_are_256_wide_and_nothing_beyond_their_ends_is_computed():
    hessian = Hessian(520, "cpu")
    hessian.add(torch.rand(3, 520) + 1)
    assert [tuple(strip.shape) for strip in hessian._strips.of(hessian._sum)] == [(256, 256), (256, 512), (8, 520)]
    assert (hessian._sum > 0).all()


def test_no_tokens_add_nothing():
    hessian = Hessian(3, "cpu")
    hessian.add(torch.empty(0, 3))
    assert hessian.tokens == 0 and not hessian.mean().any()


def test_without_other_ranks_nothing_is_sent(monkeypatch):
    monkeypatch.setattr(hessians.distributed, "sum_", lambda *_: pytest.fail("a message was sent"))
    Hessian(4, "cpu").over_ranks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_the_default_dtype_nor_the_default_device_matters(dtype):
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    means = []
    for default, device in ((torch.float32, "cpu"), (torch.float64, "meta"), (torch.bfloat16, "meta")):
        hessian = Hessian(300, "cpu", dtype)
        torch.set_default_dtype(default)
        try:
            with torch.device(device):
                hessian.add(x)
                means.append(hessian.mean())
        finally:
            torch.set_default_dtype(torch.float32)
    assert means[0].dtype == dtype and all(torch.equal(mean, means[0]) for mean in means)
