"""Passes over rows: the Triton kernels against the plain ones, and those against what they mean."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_rows

from kernel_cases import INTERPRETED, gpu, triton_device

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]
COUNTS = [(3, 0, 70, 1), (0, 0, 5), (0,), (130,), (1,) * 20]
SHAPES = [(9, 5), (17, 600), (1, 1), (16, 512)]


def rows(*shape, dtype=torch.float32, device="cpu", wider=3):
    """Rows of a wider tensor."""
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randn(*shape[:-1], shape[-1] + wider, generator=generator).to(device, dtype)[..., : shape[-1]]


def segments(counts, device="cpu"):
    return torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device)


@pytest.mark.parametrize("counts", COUNTS)
def test_each_segment_has_the_largest_magnitude_of_its_rows_and_of_those_before(counts):
    x, largest = rows(sum(counts) + 4, 7), torch.full((len(counts),), -1.0)
    x[-1] = 1e9  # a row of none
    plain_rows.include_largest_(largest, x, segments(counts))
    for part, value in zip(x[: sum(counts)].split(list(counts)), largest.tolist(), strict=True):
        assert value == (float(part.abs().max()) if len(part) else -1)
    before = largest.clone()
    plain_rows.include_largest_(largest, x / 2, segments(counts))
    assert torch.equal(largest, before)


def test_rows_with_nan_do_not_count_and_those_with_infinity_do():
    x, largest = rows(3, 7), torch.full((1,), -1.0)
    x[1, 2], x[1, 3] = torch.nan, torch.inf
    plain_rows.include_largest_(largest, x)
    assert largest.item() == x[::2].abs().max()
    x[0, 0] = -torch.inf
    plain_rows.include_largest_(largest, x)
    assert largest.item() == torch.inf


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 512, 1300])
@pytest.mark.parametrize("counts", [*COUNTS, None])
def test_the_triton_largest_is_the_plain_one(counts, width, dtype, device):
    from gptq_plugin.kernels import rows as triton_rows

    x = rows(sum(counts or [11]) + 2, width, dtype=dtype, device=device)
    x[len(x) // 2, -1], x[0, 0] = torch.nan, -torch.inf
    ends = None if counts is None else segments(counts, device)
    wanted = torch.full((len(counts or [0]),), -1.0, device=device)
    wanted[0] = 0.5
    found = wanted.clone()
    for one in (x, -3 * x[1:], x[:0]):
        some = None if ends is None else ends.clamp(max=len(one))
        plain_rows.include_largest_(wanted, one, some)
        triton_rows.include_largest_(found, one, some)
        assert torch.equal(found, wanted)


def test_products_of_rows_are_added_to_their_totals():
    x, y, totals = rows(2, 5, 7), rows(2, 5, 7, wider=0) + 1, torch.ones(2, 5)
    plain_rows.add_row_products_(totals, x, y, 2.0)
    torch.testing.assert_close(totals, 1 + 2 * torch.einsum("brc,brc->br", x, y))


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 9, 1100), (0, 5)])
def test_the_triton_products_of_rows_are_the_plain_ones(shape, dtype, device):
    from gptq_plugin.kernels import rows as triton_rows

    x, y = rows(*shape, dtype=dtype, device=device), rows(*shape, dtype=dtype, device=device, wider=0) - 1
    totals = torch.ones(shape[:-1], device=device)
    wanted = totals.double()
    plain_rows.add_row_products_(wanted, x.double(), y.double(), -2.0)
    triton_rows.add_row_products_(totals, x, y, -2.0)
    torch.testing.assert_close(totals.double(), wanted, rtol=1e-5, atol=1e-4)


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_triton_gate_is_the_plain_one_to_a_rounding(shape, dtype, device):
    from gptq_plugin.kernels import rows as triton_rows

    both = rows(shape[0], 2 * shape[1], dtype=dtype, device=device) * 8
    wanted, found = plain_rows.silu_gated(both), triton_rows.silu_gated(both)
    assert found.shape == shape and found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_the_gate_has_the_bits_of_pytorch(dtype):
    from gptq_plugin.kernels import rows as triton_rows

    bits = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype)  # every number there is
    both = torch.stack([bits.repeat(2), torch.cat([torch.ones_like(bits), bits.flip(0)])], -1)
    wanted, found = plain_rows.silu_gated(both), triton_rows.silu_gated(both)
    finite = ~wanted.isnan()
    assert torch.equal(found[finite], wanted[finite]) and bool(found[~finite].isnan().all())


@triton_device
def test_other_shapes_and_dtypes_are_refused(device):
    from gptq_plugin.kernels import rows as triton_rows

    x, largest = rows(4, 6, device=device), torch.zeros(1, device=device)
    with pytest.raises(ValueError, match="x must be"):
        triton_rows.include_largest_(largest, x.double())
    with pytest.raises(ValueError, match="largest must be"):
        triton_rows.include_largest_(largest.double(), x)
    with pytest.raises(ValueError, match="ends must be"):
        triton_rows.include_largest_(largest, x, torch.zeros(2, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="twice"):
        triton_rows.add_row_products_(torch.zeros(3, device=device), x, x)
    with pytest.raises(ValueError, match="contiguous rows"):
        triton_rows.silu_gated(x.mT)
    with pytest.raises(ValueError, match="as many columns"):
        triton_rows.silu_gated(x[:, :5])
