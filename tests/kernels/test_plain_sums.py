"""Products add up exactly in any order, and rounding them costs less than float32 does."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_sums


def products(n, count):
    g = torch.Generator().manual_seed(0)
    scales = torch.logspace(-4, 4, n)
    inputs = [torch.randn(20 * (number + 1), n, generator=g) * scales for number in range(count)]
    return [x.T @ x for x in inputs]


@pytest.mark.parametrize("n", [1, 33])
def test_the_total_does_not_depend_on_the_order(n):
    parts, totals = products(n, 9), []
    for order in (parts, parts[::-1], parts[4:] + parts[:4]):
        totals.append(torch.zeros(n, n, dtype=torch.float64))
        for part in order:
            plain_sums.add_product(totals[-1], part, part.diagonal(), 0)
    assert all(torch.equal(total, totals[0]) for total in totals)


def test_entries_that_cancel_in_one_product_and_not_in_others_add_up_in_any_order_too():
    """Such entries are the reason to round: float64 alone cannot hold 1e5 and 1e-13 at once."""
    g = torch.Generator().manual_seed(1)
    exponents = torch.randint(-14, 6, (6, 20, 20), generator=g)
    parts = list(10.0**exponents * torch.rand(6, 20, 20, generator=g))
    for part in parts:
        part.fill_diagonal_(1e6)
    totals = []
    for order in (parts, parts[::-1]):
        totals.append(torch.zeros(20, 20, dtype=torch.float64))
        for part in order:
            plain_sums.add_product(totals[-1], part, part.diagonal(), 0)
    assert torch.equal(*totals)
    wide = [part.double() for part in parts]
    assert not torch.equal(sum(wide), sum(wide[::-1]))


def test_an_entry_is_off_by_a_2_27th_of_the_roots_of_its_diagonal_at_most():
    (part,) = products(33, 1)
    total = torch.zeros(33, 33, dtype=torch.float64)
    plain_sums.add_product(total, part, part.diagonal(), 0)
    roots = part.diagonal().double().sqrt()
    assert ((total - part).abs() <= 2.0**-27 * roots * roots[:, None]).all() and not torch.equal(total, part.double())
    assert torch.equal(total.diagonal().float(), part.diagonal())  # float32 has 24 digits


def test_rows_of_a_strip_are_rounded_like_those_of_the_whole():
    (part,) = products(33, 1)
    whole, strip = torch.zeros(33, 33, dtype=torch.float64), torch.ones(5, 30, dtype=torch.float64)
    plain_sums.add_product(whole, part, part.diagonal(), 0)
    plain_sums.add_product(strip, part[25:30, :30], part.diagonal(), 25)
    assert torch.equal(strip - 1, (1 + whole[25:30, :30]) - 1)


def test_channels_without_energy_and_values_that_are_not_finite_pass():
    part = torch.tensor([[0.0, 0.0, 0.0], [0.0, float("inf"), 1.0], [0.0, 1.0, float("nan")]])
    total = torch.zeros(3, 3, dtype=torch.float64)
    plain_sums.add_product(total, part, part.diagonal(), 0)
    assert not total[0].any() and total[1, 1].isinf() and total[2, 2].isnan()
