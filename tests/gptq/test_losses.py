"""Output errors are quadratic forms with the Hessian, of any width and type, row by row."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.gptq import losses, tensor_cores
from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.gptq.losses import output_error, output_power, rounding_loss

from kernel_cases import needs_gpu
from plain_gptq import correlated, plain


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 2600])
def test_the_output_error_of_any_width_is_the_quadratic_form_with_the_whole_hessian(n):
    """Beyond 1024 inputs it is added up from strips, with only one of each two mirrored blocks."""
    generator = torch.Generator().manual_seed(n)
    error = torch.randn(3, n, generator=generator, dtype=torch.float64)
    half = torch.randn(n, n, generator=generator, dtype=torch.float64) / n
    hessian = half + half.T + torch.eye(n, dtype=torch.float64)
    expected = torch.einsum("oi,ij,oj->o", error, hessian, error)
    torch.testing.assert_close(output_error(error, hessian), expected, rtol=1e-9, atol=0)


def test_the_output_error_is_not_below_zero_and_of_16_bit_numbers_it_is_summed_in_float32():
    error = torch.ones(2, 1001, dtype=torch.bfloat16)
    hessian = torch.eye(1001, dtype=torch.bfloat16)
    found = output_error(error, hessian)
    assert found.dtype == torch.float32 and found.tolist() == [1001.0, 1001.0]  # bfloat16 would have 1000
    assert output_error(error.double(), -hessian.double()).tolist() == [0.0, 0.0]
    beside = torch.zeros(1101, 1101, dtype=torch.bfloat16)  # ones where a strip meets the one before
    beside[1024:, :1024] = beside[:1024, 1024:] = 1
    error = torch.ones(1, 1101, dtype=torch.bfloat16)
    error[0, 0] = 3
    assert output_error(error, beside).item() == 2 * 77 * 1026  # bfloat16 would have 2 * 78848


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_rows_give_the_baseline_and_the_power_of_each_row_in_the_type_of_the_weights(dtype):
    weight, hessian = correlated(rows=6, n=96)
    config = plain(bits=3, group_size=32)
    blocks = weight.to(dtype).unflatten(0, (3, 2))
    error = weight - round_to_nearest(weight, config).dequantize(torch.float64)
    loss, power = rounding_loss(blocks, hessian, config), output_power(blocks, hessian)
    assert loss.dtype == power.dtype == dtype
    torch.testing.assert_close(loss.double(), output_error(error, hessian), rtol=1e-5, atol=0)
    torch.testing.assert_close(power.double(), torch.einsum("oi,ij,oj->o", weight, hessian, weight), rtol=1e-5, atol=0)


def test_where_a_gpu_multiplies_in_bfloat16_losses_are_near_and_of_the_weights_type(monkeypatch):
    weight, hessian = (one.float() for one in correlated(rows=64, n=96))
    config, blocks = plain(bits=3, group_size=32), weight.unflatten(0, (2, 32))
    exact = rounding_loss(blocks, hessian, config), output_power(blocks, hessian)
    monkeypatch.setattr(tensor_cores, "usable", lambda tensor: True)
    for found, expected in zip((rounding_loss(blocks, hessian, config), output_power(blocks, hessian)), exact):
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        assert abs(float(found.sum() / expected.sum()) - 1) < 2e-3


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("n", [5, 1024, 1100])
def test_where_a_gpu_multiplies_in_float16_losses_of_float32_errors_are_near(n, device, monkeypatch):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, n, generator=generator) * torch.logspace(-2, 2, n)
    error = torch.randn(7, n, generator=generator) * torch.logspace(-9, 9, 7)[:, None]
    hessian = x.T @ x / n
    expected = torch.einsum("oi,ij,oj->o", error.double(), hessian.double(), error.double())
    monkeypatch.setattr(tensor_cores, "usable", lambda tensor: True)
    found = output_error(error.to(device), hessian.to(device))
    assert found.dtype == torch.float32 and torch.equal(
        found, losses._narrow_output_error(error.to(device), hessian.to(device))
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-3, atol=0)


def test_losses_are_where_the_errors_are():
    assert output_error(torch.empty(2, 4, device="meta"), torch.empty(4, 4, device="meta")).device.type == "meta"
