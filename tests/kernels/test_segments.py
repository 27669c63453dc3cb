"""Sums for segments of rows: the Triton kernels against the plain ones, and those against each segment's product."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_segments

from kernel_cases import INTERPRETED, triton_device

DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # which tl.dot takes for int16 there
COUNTS = [(3, 0, 70, 1), (0, 0, 5), (0,), (130,)]


def segments(counts, n, dtype, device="cpu", beyond=3):
    x = torch.randn(sum(counts) + beyond, n, generator=torch.Generator().manual_seed(n)).to(device, dtype)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device)
    totals = torch.randn(len(counts), n, n, generator=torch.Generator().manual_seed(1)).to(device)
    return totals, x, ends


@pytest.mark.parametrize("counts", COUNTS)
def test_each_segments_product_is_added_to_its_total(counts):
    totals, x, ends = segments(counts, 9, torch.float32)
    before = totals.clone()
    plain_segments.add_products(totals, x, ends)
    for number, rows in enumerate(x[: sum(counts)].split(list(counts))):
        torch.testing.assert_close(totals[number], before[number] + rows.T @ rows)


@pytest.mark.parametrize("counts", COUNTS)
def test_each_segments_product_with_other_rows_is_added_to_its_total(counts):
    totals, x, ends = segments(counts, 9, torch.float32)
    before, y = totals.clone(), x.flip(1) * 2
    plain_segments.add_cross_products(totals, x, y, ends)
    each = zip(x[: sum(counts)].split(list(counts)), y[: sum(counts)].split(list(counts)), strict=True)
    for number, (rows, others) in enumerate(each):
        torch.testing.assert_close(totals[number], before[number] + rows.T @ others)


def test_the_part_below_the_diagonal_is_copied_above_it():
    totals = torch.randn(3, 7, 7)
    lower = totals.tril()
    found = plain_segments.symmetric_(totals)
    assert found is totals and torch.equal(found, found.mT) and torch.equal(found.tril(), lower)


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 128, 200, 300])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_triton_sum_is_the_plain_one(counts, n, dtype, device):
    from gptq_plugin.kernels import segments as triton_segments

    totals, x, ends = segments(counts, n, dtype, device)
    wanted = totals.clone()
    x[sum(counts) :] = torch.nan  # rows of none
    plain_segments.add_products(wanted, x, ends)
    triton_segments.add_products(totals, x, ends)
    torch.testing.assert_close(totals.tril(), wanted.tril(), rtol=1e-5, atol=1e-4)


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 128, 200, 300])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_triton_sum_with_other_rows_is_the_plain_one(counts, n, dtype, device):
    from gptq_plugin.kernels import segments as triton_segments

    totals, x, ends = segments(counts, n, dtype, device)
    wanted, y = totals.clone(), torch.cat([x.flip(1), x], 1)[:, :n]  # whose rows are apart
    x[sum(counts) :] = y[sum(counts) :] = torch.nan  # rows of none
    plain_segments.add_cross_products(wanted, x, y, ends)
    triton_segments.add_cross_products(totals, x, y, ends)
    torch.testing.assert_close(totals, wanted, rtol=1e-5, atol=1e-4)


@triton_device
@pytest.mark.parametrize("n", [1, 64, 150])
def test_the_triton_copy_is_the_plain_one(n, device):
    from gptq_plugin.kernels import segments as triton_segments

    totals = torch.randn(3, n, n, device=device)
    wanted = plain_segments.symmetric_(totals.clone())
    assert torch.equal(triton_segments.symmetric_(totals), wanted)


@triton_device
def test_the_triton_sum_reads_rows_that_are_apart(device):
    from gptq_plugin.kernels import segments as triton_segments

    totals, x, ends = segments((3, 0, 70, 1), 40, torch.float16, device)
    wanted, wide = totals.clone(), torch.cat([x, x], 1)
    plain_segments.add_products(wanted, x, ends)
    triton_segments.add_products(totals, wide[:, :40], ends)
    torch.testing.assert_close(totals.tril(), wanted.tril(), rtol=1e-5, atol=1e-4)


@triton_device
def test_the_triton_sum_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import segments as triton_segments

    totals, x, ends = segments((3, 4), 16, torch.bfloat16, device)
    with pytest.raises(ValueError, match="totals must be contiguous float32"):
        triton_segments.add_products(totals.double(), x, ends)
    with pytest.raises(ValueError, match="x must be float16 or bfloat16"):
        triton_segments.add_products(totals, x.float(), ends)
    with pytest.raises(ValueError, match="ends must be contiguous int32"):
        triton_segments.add_products(totals, x, ends.long())
    with pytest.raises(ValueError, match="y must be float16 or bfloat16"):
        triton_segments.add_cross_products(totals, x, x.float(), ends)
    with pytest.raises(ValueError, match="x and y must be alike"):
        triton_segments.add_cross_products(totals, x, x[1:], ends)
    with pytest.raises(ValueError, match="totals must be contiguous float32"):
        triton_segments.symmetric_(totals[:, :, :-1])


def test_rows_behind_the_last_end_become_zero():
    rows = torch.randn(7, 5)
    before = rows.clone()
    assert plain_segments.zero_behind_(rows, torch.tensor([2, 4], dtype=torch.int32)) is rows
    assert torch.equal(rows[:4], before[:4]) and not rows[4:].any()


@triton_device
@pytest.mark.parametrize(("count", "n", "last"), [(300, 70, 100), (64, 64, 64), (10, 3, 0), (130, 200, 129)])
def test_the_triton_zeros_are_the_plain_ones(count, n, last, device):
    from gptq_plugin.kernels import segments as triton_segments

    rows = torch.randn(count, n, device=device).half()
    rows[last:] = torch.nan
    ends = torch.tensor([last // 2, last], dtype=torch.int32, device=device)
    wanted = plain_segments.zero_behind_(rows.clone(), ends)
    assert torch.equal(triton_segments.zero_behind_(rows, ends), wanted)
    with pytest.raises(ValueError, match="ends must be contiguous int32"):
        triton_segments.zero_behind_(rows, ends.long())
    with pytest.raises(ValueError, match="rows must be contiguous"):
        triton_segments.zero_behind_(rows[:, ::2], ends)
