"""The Triton passes over whole matrices against the plain ones."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import reference

from kernel_cases import make_grids, triton_device


@triton_device
@pytest.mark.parametrize(("batch", "n"), [(1, 7), (2, 33), (1, 1100)])
def test_the_triton_permutation_is_the_plain_one(batch, n, device):
    from gptq_plugin.kernels import passes

    matrices = torch.randn(batch, n, n, device=device)
    order = torch.stack([torch.randperm(n) for _ in range(batch)]).to(device)
    factors = torch.arange(1.0, batch + 1, device=device) / 4
    for m in (matrices, matrices.mT):
        assert torch.equal(passes.permute(m, order, factors), reference.permute(m, order, factors))
    with pytest.raises(ValueError, match="need"):
        passes.permute(matrices, order[:, 1:], factors)


@triton_device
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 5, 7), (2, 33, 2100)])
@pytest.mark.parametrize(("pieces", "dim"), [("lhh", 2), ("hlh", 1), ("hlhh", 1)])
def test_the_triton_split_is_the_plain_one(batch, rows, columns, pieces, dim, device):
    from gptq_plugin.kernels import passes

    x = torch.randn(batch, rows, columns + 3, device=device)[..., 2:-1]  # rows of a larger matrix
    assert torch.equal(passes.split_to_float16(x, 64.0, pieces, dim), reference.split_to_float16(x, 64.0, pieces, dim))


@triton_device
def test_the_triton_split_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import passes

    x = torch.randn(1, 4, 6, device=device)
    with pytest.raises(ValueError, match=r"x must be float32 \[B, rows, columns\] with contiguous rows"):
        passes.split_to_float16(x.mT, 1.0, "hlh", 1)
    with pytest.raises(ValueError, match="one l"):
        passes.split_to_float16(x, 1.0, "hh", 1)


@triton_device
@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 7), (9, 3, 32), (5, 2, 1100)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_triton_nearest_errors_are_the_plain_ones(rows, groups, size, bits, device):
    from gptq_plugin.kernels import passes

    weight = torch.randn(rows, groups * size, device=device)
    scales = torch.rand(rows, groups, device=device).half().float() * 4 / 2**bits + 0.01
    zeros = torch.randint(0, 2**bits, (rows, groups), device=device).float()
    for dtype in (torch.float32, torch.float16):
        found = passes.nearest_errors(weight, scales, zeros, bits, dtype)
        wanted = reference.nearest_errors(weight, scales, zeros, bits, dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
        assert found.dtype == dtype and found.isfinite().all()
    with pytest.raises(ValueError, match="scales must be contiguous float32"):
        passes.nearest_errors(weight, scales[:, :-1].double(), zeros, bits, torch.float32)


@triton_device
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "groups", "size"), [(33, 2, 128), (5, 3, 48), (1, 1, 300), (17, 4, 15), (16, 1, 1)])
def test_the_triton_forecast_is_the_plain_one(rows, groups, size, bits, device):
    from gptq_plugin.kernels import passes

    grids = make_grids(rows, groups, size, bits, device=device)
    found = passes.clipping_errors(**vars(grids), bits=bits)
    wanted = reference.clipping_errors(**{k: v.double() for k, v in vars(grids).items()}, bits=bits)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@triton_device
@pytest.mark.parametrize(("rows", "groups", "size"), [(5, 2, 16), (40, 3, 7), (16, 1, 130)])
def test_each_matrix_is_clipped_by_its_own_shares(rows, groups, size, device):
    from gptq_plugin.kernels import passes

    generator = torch.Generator().manual_seed(rows)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    matrices, n = 3, groups * size
    weight, scales, zeros = (
        normal(matrices * rows, n),
        normal(2, matrices * rows, groups).abs() + 0.1,
        normal(2, matrices * rows, groups),
    )
    spread, gain = normal(matrices, n).abs(), normal(matrices, n).abs()
    found = passes.clipping_errors(weight, scales, zeros, spread, gain, 4)
    plain = reference.clipping_errors(*(one.double() for one in (weight, scales, zeros, spread, gain)), 4)
    for number in range(matrices):
        own = slice(number * rows, (number + 1) * rows)
        parts = (weight[own], scales[:, own].contiguous(), zeros[:, own].contiguous(), spread[number], gain[number])
        torch.testing.assert_close(found[:, own], passes.clipping_errors(*parts, 4), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain[:, own], reference.clipping_errors(*(one.double() for one in parts), 4))
    torch.testing.assert_close(found.double(), plain, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="divide"):
        passes.clipping_errors(weight[:-1], scales[:, :-1].contiguous(), zeros[:, :-1].contiguous(), spread, gain, 4)


@triton_device
def test_the_triton_forecast_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import passes

    grids = make_grids(4, 2, 16, 4, device=device)
    with pytest.raises(ValueError, match=r"weight must be contiguous float32 \[4, 32\]"):
        passes.clipping_errors(**{**vars(grids), "weight": grids.weight.double()}, bits=4)
    with pytest.raises(ValueError, match=r"gain must be contiguous float32 \[32\]"):
        passes.clipping_errors(**{**vars(grids), "gain": grids.gain[:5]}, bits=4)
