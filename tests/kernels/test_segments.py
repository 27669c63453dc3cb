"""Sums for segments of rows: the Triton kernels against the plain ones, and those against each segment's product."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_segments
from gptq_plugin.kernels.strips import Strips

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


def uneven(n, dtype, device="cpu", whole=False):
    """Batches of rows, their segments' ends, and the rows with others' columns. All numbers are small and whole if
    asked, so that products have no rounding. Else every third column meets none of others in the rows that give it its
    energy, and very small numbers or large ones in others: entries of products differ by more than float64 can hold."""
    for number, counts in enumerate([(5, 0, 70), (40, 9, 6), (6, 65, 64)]):
        g = torch.Generator().manual_seed(number)
        x, ends = torch.randn(sum(counts) + 3, n, generator=g), torch.tensor(counts).cumsum(0, dtype=torch.int32)
        if whole:
            x = (3 * x).round()
        else:
            x *= 2.0 ** torch.randint(-14, -8, x.shape, generator=g) if number == 0 else 4.0
            for start in [0, *ends[:-1].tolist()]:
                x[start : start + 3] = 8 * torch.eye(3).repeat(1, n // 3 + 1)[:, :n]
        x[:, n // 2] = 0  # a dead channel
        x[sum(counts) :] = torch.nan  # rows of none
        yield x.to(device, dtype), x.flip(1).to(device, dtype), ends.to(device)


def lower(module, batches, n):
    """Exact sums of products on and below the diagonal, as matrices, of three segments."""
    strips = Strips(n, plain_segments.WIDTH)
    totals = torch.zeros(3, strips.size, dtype=torch.float64, device=batches[0][0].device)
    for x, _, ends in batches:
        module.add_exact_products(totals, x, ends)
    rows = [torch.nn.functional.pad(strip, (0, n - strip.shape[-1])) for strip in strips.of(totals)]
    return torch.cat(rows, 1).tril()


def across(module, batches, n):
    """Exact sums of products with the other rows, likewise."""
    totals = torch.zeros(3, n, n, dtype=torch.float64, device=batches[0][0].device)
    for x, y, ends in batches:
        module.add_exact_cross_products(totals, x, y, ends)
    return totals


def in_double(batches, n, kind):
    found = torch.zeros(3, n, n, dtype=torch.float64)
    for x, y, ends in batches:
        other = (x if kind is lower else y).double().cpu()
        for number, rows in enumerate(torch.tensor_split(torch.arange(len(x)), ends.long().cpu())[:-1]):
            found[number] += x.double().cpu()[rows].T @ other[rows]
    return found.tril() if kind is lower else found


@pytest.mark.parametrize("kind", [lower, across])
@pytest.mark.parametrize("n", [9, 150, 300])
def test_exact_sums_of_segments_are_those_of_their_products_in_any_order(n, kind):
    batches = list(uneven(n, torch.float32))
    found = kind(plain_segments, batches, n)
    assert torch.equal(found, kind(plain_segments, batches[::-1], n))
    wanted = in_double(batches, n, kind)
    roots = in_double([(x, x, ends) for x, _, ends in batches], n, across).diagonal(dim1=1, dim2=2).sqrt()
    sizes = roots[:, :, None] * (roots if kind is lower else roots.flip(1))[:, None]
    assert ((found - wanted).abs() <= 1e-6 * sizes).all() and found.abs().amax((1, 2)).all()


@pytest.mark.parametrize("kind", [lower, across])
def test_exact_products_are_rounded_some_rows_at_a_time(kind, monkeypatch):
    batches, rows, plain = list(uneven(300, torch.float32, whole=True)), [], plain_segments.add_product
    wanted = kind(plain_segments, batches, 300)
    monkeypatch.setattr(plain_segments, "_STRIP", 128)
    monkeypatch.setattr(plain_segments, "add_product", lambda *given: rows.append(len(given[1])) or plain(*given))
    assert torch.equal(kind(plain_segments, batches, 300), wanted) and set(rows) == {128, 44}


@pytest.mark.parametrize("kind", [lower, across])
def test_exact_products_are_rounded_by_their_own_columns_energy(kind, monkeypatch):
    monkeypatch.setattr(plain_segments, "_STRIP", 128)
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    x[:, :128] *= 2.0**12
    batches = [(x, x.clone(), torch.tensor([9, 9, 40], dtype=torch.int32))]
    wanted = in_double(batches, 300, kind)
    roots = in_double(batches, 300, across).diagonal(dim1=1, dim2=2).sqrt()
    error = (kind(plain_segments, batches, 300) - wanted).abs()
    assert (error <= 1e-6 * roots[:, :, None] * roots[:, None]).all()


def test_squares_of_each_segments_columns_are_added_up():
    _, x, ends = segments((3, 0, 70, 1), 9, torch.float32)
    x[-3:] = torch.nan
    wanted = [rows.square().sum(0) for rows in x[:74].split([3, 0, 70, 1])]
    torch.testing.assert_close(plain_segments.squares(x, ends), torch.stack(wanted))


def test_the_part_below_the_diagonal_is_copied_above_it():
    totals = torch.randn(3, 7, 7)
    lower = totals.tril()
    found = plain_segments.symmetric_(totals)
    assert found is totals and torch.equal(found, found.mT) and torch.equal(found.tril(), lower)


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 128, 300])
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
@pytest.mark.parametrize("n", [16, 128, 300])
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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 128, 300])
@pytest.mark.parametrize("kind", [lower, across])
def test_the_triton_exact_sum_is_the_plain_one_and_depends_on_no_order(kind, n, dtype, device):
    from gptq_plugin.kernels import segments as triton_segments

    whole = list(uneven(n, dtype, device, whole=True))
    assert torch.equal(kind(triton_segments, whole, n), kind(plain_segments, whole, n))
    batches = list(uneven(n, dtype, device))
    found = kind(triton_segments, batches, n)
    assert torch.equal(found, kind(triton_segments, batches[::-1], n))
    wanted = kind(plain_segments, batches, n)
    roots = across(plain_segments, [(x, x, ends) for x, _, ends in batches], n).diagonal(dim1=1, dim2=2).sqrt()
    sizes = roots[:, :, None] * (roots if kind is lower else roots.flip(1))[:, None]
    assert ((found - wanted).abs() <= 1e-6 * sizes).all()


@triton_device
@pytest.mark.parametrize("counts", COUNTS)
def test_the_triton_squares_are_the_plain_ones(counts, device):
    from gptq_plugin.kernels import segments as triton_segments

    for n in (1, 64, 150):
        _, x, ends = segments(counts, n, torch.float16, device)
        x[sum(counts) :] = torch.nan
        torch.testing.assert_close(triton_segments.squares(x, ends), plain_segments.squares(x, ends))


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
    with pytest.raises(ValueError, match=r"totals must be contiguous torch.float32 \[E, 16, 16\]"):
        triton_segments.add_products(totals.double(), x, ends)
    with pytest.raises(ValueError, match=r"totals must be contiguous torch.float64 \[E, 256\]"):
        triton_segments.add_exact_products(totals.double(), x, ends)
    with pytest.raises(ValueError, match=r"totals must be contiguous torch.float64 \[E, 16, 16\]"):
        triton_segments.add_exact_cross_products(totals, x, x, ends)
    with pytest.raises(ValueError, match="x must be .* with contiguous rows"):
        triton_segments.squares(x.T, ends)
    with pytest.raises(ValueError, match="ends must be contiguous int32"):
        triton_segments.squares(x, ends.long())
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
