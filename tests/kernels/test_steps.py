"""The Triton passes of the steps that improve rounded rows, against the plain ones in float64."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_steps

from gptq_plugin import kernels
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq import tensor_cores
from gptq_plugin.gptq.solver import solve

from kernel_cases import triton_device


def rounded(groups, size, rows, bits=3, device="cpu", shuffled=True):
    """Of two matrices weights, codes, grids, the groups of channels, an order of channels and the channels group by
    group."""
    g, n = torch.Generator().manual_seed(groups * size + rows), groups * size
    weight = torch.randn(2, n, rows, generator=g)
    codes = torch.randint(0, 2**bits, (2, n, rows), generator=g, dtype=torch.uint8)
    scales = (torch.rand(2, groups, rows, generator=g) + 0.1).half().float()
    zeros = torch.randint(0, 2**bits, (2, groups, rows), generator=g).float()
    natural = torch.arange(n).repeat(2, 1)
    channels = torch.stack([torch.randperm(n, generator=g) for _ in range(2)]) if shuffled else natural
    group = torch.empty_like(channels).scatter_(1, channels, natural // size)
    order = torch.stack([torch.randperm(n, generator=g) for _ in range(2)])
    return tuple(t.to(device) for t in (weight, codes, scales, zeros, group, order, channels))


def correlated(n, device, scale=1.0):
    """Two matrices, one of them with entries a thousand times as large."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2, 3 * n, n, generator=g) @ torch.randn(n, n, generator=g) * torch.logspace(-1, 1, n)
    return (x.mT @ x / x.shape[1] * torch.tensor([scale, 1e3 * scale])[:, None, None]).to(device)


def permuted(hessian, channels):
    return torch.stack([one[own][:, own] for one, own in zip(hessian, channels, strict=True)])


def doubled(*tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@triton_device
@pytest.mark.parametrize(("groups", "size", "rows"), [(1, 7, 1), (3, 32, 300), (2, 48, 33)])
def test_the_triton_errors_of_a_rounding_are_the_plain_ones(groups, size, rows, device):
    from gptq_plugin.kernels import steps

    *of_rounding, group, order, _ = rounded(groups, size, min(rows, 40) if device == "cpu" else rows, device=device)
    found = steps.rounding_errors(*of_rounding, group, order)
    wanted = plain_steps.rounding_errors(*doubled(*of_rounding), group, order)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@triton_device
@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 7), (19, 3, 32), (150, 2, 200)])
def test_the_triton_errors_of_grids_are_the_plain_ones(rows, groups, size, device):
    from gptq_plugin.kernels import steps

    if device == "cpu":  # the interpreter is slow
        size = min(size, 9)
    targets, _, _, _, _, _, channels = rounded(groups, size, rows, device=device)
    gain = torch.rand(2, groups * size, device=device)
    scales = torch.rand(4, 2, groups, rows, device=device) + 0.1
    zeros = torch.randint(0, 8, (4, 2, groups, rows), device=device).float()
    found = steps.grid_errors(targets, channels, scales, zeros, gain, 3)
    wanted = plain_steps.grid_errors(*doubled(targets, channels, scales, zeros, gain), 3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@triton_device
@pytest.mark.parametrize(
    ("groups", "size", "rows", "scale", "bits"),
    [
        (3, 32, 70, 1.0, 2), (2, 128, 5, 1e9, 8), (1, 256, 140, 1.0, 8), (2, 48, 33, 1e-9, 2),
        (5, 16, 1, 1.0, 8), (3, 20, 9, 1e9, 2), (1, 7, 2, 1e-9, 8),
    ],
)  # fmt: skip
def test_the_triton_equations_for_scales_are_the_plain_ones(groups, size, rows, scale, bits, device):
    from gptq_plugin.kernels import steps

    weight, codes, scales, zeros, group, _, channels = rounded(groups, size, rows, bits, device)
    hessian = correlated(groups * size, device, scale)
    errors = plain_steps.rounding_errors(weight, codes, scales / 2**bits, zeros, group, channels)
    some = slice(rows // 3, rows)
    matrix, right = steps.scale_equations(
        steps.grouped_hessian(permuted(hessian, channels)), codes, zeros, errors, channels, some
    )
    exact = plain_steps.grouped_hessian(permuted(hessian, channels).double())
    wanted = plain_steps.scale_equations(exact, codes, zeros.double(), errors.double(), channels, some)
    size_of = wanted[0].diagonal(dim1=2, dim2=3).sqrt()
    assert matrix.dtype == right.dtype == torch.float32
    shares = size_of[..., None] * size_of[:, :, None]
    torch.testing.assert_close(matrix.double() / shares, wanted[0] / shares, rtol=0, atol=1e-3)
    wrong = errors[:, :, some].double()
    most = torch.einsum("bir,bij,bjr->br", wrong, exact[0], wrong).sqrt()[..., None]
    torch.testing.assert_close(right.double() / size_of / most, wanted[1] / size_of / most, rtol=0, atol=1e-3)


@triton_device
def test_the_triton_equations_of_many_rows_are_those_of_each(device):
    from gptq_plugin.kernels import steps

    rows = 300 if device == "cpu" else 128 * 19 + 5  # beyond the rows that programs take together
    _, codes, _, zeros, _, _, channels = rounded(3, 16, rows, 4, device, shuffled=False)
    errors, hessian = torch.randn(2, 48, rows, device=device), steps.grouped_hessian(correlated(48, device))
    matrix, right = steps.scale_equations(hessian, codes, zeros, errors, channels, slice(0, rows))
    assert not matrix.isnan().any() and not right.isnan().any()
    for first in (0, 128, rows - 7):
        some = slice(first, min(first + 40, rows))
        part = steps.scale_equations(hessian, codes, zeros, errors, channels, some)
        assert torch.equal(matrix[:, some], part[0])
        for of_all, own in zip(right, part[1], strict=True):
            torch.testing.assert_close(of_all[some], own, rtol=1e-4, atol=1e-6 * float(of_all.abs().max()))


@triton_device
def test_the_triton_passes_name_what_they_cannot_take(device):
    from gptq_plugin.kernels import steps

    weight, codes, scales, zeros, group, order, channels = rounded(2, 16, 5, device=device)
    with pytest.raises(ValueError, match=r"codes must be contiguous torch.uint8 \[2, 32, 5\]"):
        steps.rounding_errors(weight, codes.int(), scales, zeros, group, order)
    with pytest.raises(ValueError, match=r"channel must be contiguous torch.int64 \[2, 32\]"):
        steps.grid_errors(weight, channels[:, :16], scales[None], zeros[None], torch.ones(2, 32, device=device), 3)
    with pytest.raises(ValueError, match=r"errors must be contiguous torch.float32 \[2, 32, 5\], got torch.float64"):
        hessian = steps.grouped_hessian(correlated(32, device))
        steps.scale_equations(hessian, codes, zeros, weight.double(), channels, slice(0, 5))


@triton_device
@pytest.mark.parametrize("options", [{}, {"sym": False, "static_groups": False, "group_size": -1}], ids=str)
def test_with_the_triton_kernels_rows_are_improved_as_in_plain_pytorch(options, device, monkeypatch):
    weight, hessian = torch.randn(48, 32), correlated(32, "cpu")[0] + torch.eye(32)
    drift = 0.02 * hessian + 0.01 * torch.randn(32, 32)
    config = QuantizeConfig(
        **{"bits": 3, "group_size": 16, "method": "best", "scale_rounds": 1, "refit_rounds": 1, **options}
    )
    plain = solve(weight, hessian, config, drift)
    if device == "cpu":
        monkeypatch.setattr(kernels, "_by_triton", lambda x: x.dtype == torch.float32)
        monkeypatch.setattr(tensor_cores, "usable", lambda x: x.dtype == torch.float32)
    found = solve(*(t.to(device) for t in (weight, hessian)), config, drift.to(device))
    error = weight.double() - found.weight.dequantize(torch.float64).cpu()
    exact = torch.einsum("oi,ij,oj->o", error, hessian.double(), error)
    torch.testing.assert_close(found.loss.cpu().double(), exact, rtol=3e-3, atol=0)
    torch.testing.assert_close(found.loss.cpu().double().sum(), exact.sum(), rtol=1e-3, atol=0)
    # Where two steps of a row are level, noise decides between them, and with it what the row becomes.
    assert (found.weight.codes.cpu() == plain.weight.codes).double().mean() > 0.8
    assert abs(float(found.loss.sum().cpu() / plain.loss.sum()) - 1) < 0.02
