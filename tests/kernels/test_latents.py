"""Weights that are trained: the plain definition against autograd's, and the Triton kernels against the plain one."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_latents

from kernel_cases import DTYPES, INTERPRETED, triton_device

SHAPES = [(1, 1, 1), (5, 3, 32), (70, 2, 128), (33, 1, 300), (3, 5, 7)]  # rows, groups, channels of a group


def case(rows, groups, size, device="cpu"):
    g = torch.Generator().manual_seed(rows + size)
    scales = (torch.rand(rows, groups, generator=g) + 0.01).half().float()
    zeros = torch.randint(0, 4, (rows, groups), generator=g).float()
    latents = torch.randn(rows, groups * size, generator=g) * 2
    latents[:, ::3] = latents[:, ::3].round() + 0.5  # halves go to even
    gradient = torch.randn(rows, groups * size, generator=g)
    return [one.to(device) for one in (latents, scales, -zeros, 3 - zeros, gradient)]


class PassesUnchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("in_order", [True, False])
def test_gradients_pass_the_rounding_and_hold_what_would_lead_beyond_the_ends(in_order):
    latents, scales, low, high, gradient = case(6, 3, 8)
    groups = None if in_order else torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(0))
    of_channel = torch.arange(24) // 8 if in_order else groups
    leaves = [one.clone().requires_grad_() for one in (latents, scales)]
    codes = PassesUnchanged.apply(leaves[0]).clamp(low[:, of_channel], high[:, of_channel])
    weight = codes * leaves[1][:, of_channel]
    assert torch.equal(plain_latents.weight_of(latents, scales, (low, high), groups, torch.float32), weight)
    of_scales, of_latents = plain_latents.gradients(gradient, latents, scales, (low, high), groups)
    (weight * gradient).sum().backward()
    torch.testing.assert_close(of_scales, leaves[1].grad)
    expected = gradient * scales[:, of_channel]  # back towards the grid it may go, where autograd's clamp has none
    outwards = (latents > high[:, of_channel]) & (expected < 0) | (latents < low[:, of_channel]) & (expected > 0)
    assert outwards.any() and torch.equal(of_latents, torch.where(outwards, 0.0, expected))
    inside = (latents >= low[:, of_channel]) & (latents <= high[:, of_channel])
    torch.testing.assert_close(of_latents[inside], leaves[0].grad[inside])


def test_frozen_codes_have_no_gradient():
    latents, scales, low, high, gradient = case(6, 3, 8)
    codes = latents.round().clamp(low.repeat_interleave(8, 1), high.repeat_interleave(8, 1)).to(torch.int8)
    wanted = plain_latents.weight_of(latents, scales, (low, high), None, torch.float32)
    assert torch.equal(plain_latents.weight_of(codes, scales, None, None, torch.float32), wanted)
    of_scales, none = plain_latents.gradients(gradient, codes, scales, None, None)
    assert none is None
    assert torch.equal(of_scales, plain_latents.gradients(gradient, latents, scales, (low, high), None)[0])


@triton_device
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES)  # its bfloat16 is cut, not rounded
@pytest.mark.parametrize("codes", [None, torch.int8, torch.int16])
def test_the_triton_kernels_give_what_the_plain_ones_do(shape, dtype, codes, device):
    from gptq_plugin.kernels import latents as triton_latents

    values, scales, low, high, gradient = case(*shape, device)
    ends, gradient = (low, high), gradient.to(dtype)
    if codes is not None:
        values, ends = values.round().to(codes), None
    weight = triton_latents.weight_of(values, scales, ends, None, dtype)
    assert weight.dtype == dtype
    assert torch.equal(weight, plain_latents.weight_of(values, scales, ends, None, dtype))
    found = triton_latents.gradients(gradient, values, scales, ends, None)
    wanted = plain_latents.gradients(gradient, values, scales, ends, None)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-4)
    assert found[1] is wanted[1] is None if codes else torch.equal(found[1], wanted[1])


@triton_device
def test_the_triton_kernels_name_what_they_cannot_take(device):
    from gptq_plugin.kernels import latents as triton_latents

    values, scales, low, high, gradient = case(5, 3, 32, device)
    ends = (low, high)
    with pytest.raises(ValueError, match="scales must be contiguous float32, a column for each group of codes"):
        triton_latents.weight_of(values, scales.double(), ends, None, torch.float32)
    with pytest.raises(ValueError, match="high must be contiguous float32"):
        triton_latents.weight_of(values, scales, (low, high[:, :2]), None, torch.float32)
    with pytest.raises(ValueError, match="codes must be contiguous, of torch.float32"):
        triton_latents.weight_of(values.half(), scales, ends, None, torch.float32)
    with pytest.raises(ValueError, match="codes must be contiguous, of torch.int8 or torch.int16"):
        triton_latents.weight_of(values, scales, None, None, torch.float32)
    with pytest.raises(ValueError, match="of_weight must be contiguous"):
        triton_latents.gradients(gradient.t().contiguous().t(), values, scales, ends, None)
    with pytest.raises(ValueError, match="groups must be in order"):
        triton_latents.weight_of(values, scales, ends, torch.zeros(96, dtype=torch.int64), torch.float32)
