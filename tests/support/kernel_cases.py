"""Layers, blocks of columns and grids for the kernels' tests, and where those of the Triton kernels run."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gptq_plugin.layers import packing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A unit in the last place of the output: one rounding of the product, one of the sum with the bias.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gpu(test):
    """Marks a test that needs a GPU."""
    for mark in needs_gpu:
        test = mark(test)
    return test


triton_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")),
        pytest.param("cuda", marks=needs_gpu),
    ],
)

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """A layer: act-order shuffles its g_idx; group_size None is one group."""

    n_in: int
    n_out: int
    group_size: int | None
    act_order: bool = False


# Sizes that fill no tile and no word; groups of every kind the kernel tells apart: deeper than a tile, with a
# power of two inside (96, 48), without (15), as long as in_features, longer, and one cut short (100/32).
CASES = (
    Case(128, 64, 32),
    Case(256, 33, 128),
    Case(192, 45, 96),
    Case(96, 70, 48),
    Case(48, 16, 16),
    Case(75, 37, 15),
    Case(161, 70, None),
    Case(40, 9, 64),
    Case(100, 65, 32),
    Case(128, 37, 32, act_order=True),
    Case(99, 130, 11, act_order=True),
    Case(1, 1, None),
)


@dataclass(frozen=True)
class Layer:
    packed: tuple[Tensor, Tensor, Tensor, Tensor, int]
    weight: Tensor  # float64 [out, in]: the formula, from the codes that were packed
    group_size: int | None  # what a caller may promise


def make_layer(case: Case, bits: int, device: str = "cpu") -> Layer:
    generator = torch.Generator().manual_seed(case.n_in * 31 + bits)
    group_size = case.group_size or case.n_in
    groups = -(-case.n_in // group_size)
    codes = torch.randint(0, 2**bits, (case.n_out, case.n_in), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (groups, case.n_out), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, case.n_out, generator=generator) + 0.1).half()
    g_idx = torch.arange(case.n_in, dtype=torch.int32) // group_size
    if case.act_order:
        g_idx = g_idx[torch.randperm(case.n_in, generator=generator)]
    weight = (codes.double() - zeros.double()[g_idx].t()) * scales.double()[g_idx].t()
    tensors = (packing.pack_weight(codes, bits), packing.pack_zeros(zeros, bits), scales, g_idx)
    qweight, qzeros, scales, g_idx = (t.to(device) for t in tensors)
    return Layer((qweight, qzeros, scales, g_idx, bits), weight, None if case.act_order else group_size)


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y = x Wᵀ + bias with W rounded to x's dtype, which is the only rounding before the sum."""
    expected = x.cpu().double() @ weight.to(x.dtype).double().t()
    if bias is not None:
        expected += bias.cpu().double()
    assert y.dtype == x.dtype and y.shape == expected.shape
    error = (y.cpu().double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[x.dtype], f"relative error {error:.1e}"  # NaN is not less than anything


@dataclass
class Block:
    """The arguments of solve_span; its outputs are poisoned."""

    pushed: Tensor
    weight: Tensor
    factor: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor
    channel: Tensor
    gain: Tensor
    damping: Tensor
    codes: Tensor
    errors: Tensor
    loss: Tensor

    def solve(self, by, bits):
        """What `by` makes of a copy."""
        copy = Block(**{name: value.clone() for name, value in vars(self).items()})
        by(**vars(copy), bits=bits)
        return copy


def make_block(columns, rows, bits, device="cpu", dtype=torch.float32, batch=1, alternatives=1, seed=0):
    """A block of columns, three channels less than there are, with errors that matter to the columns visited later."""
    generator = torch.Generator().manual_seed(columns * 1000 + rows + seed)
    width, n = alternatives * rows, columns + 3

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "pushed": normal(batch, columns, width) * 0.1,
        "weight": normal(batch, n, rows),
        "factor": torch.triu(normal(columns, columns) * 0.1, 1) + torch.eye(columns),
        "scales": normal(batch, 3, width).abs().half().double() * 2 / 2**bits + 0.05,
        "zeros": torch.randint(0, 2**bits, (batch, 3, width), generator=generator).double(),
        "group": torch.randint(0, 3, (columns,), generator=generator).int(),
        "channel": torch.randperm(n, generator=generator)[:columns].int(),
        "gain": normal(columns).square(),
        "damping": normal(columns).square() * 0.01,
        "codes": torch.full((batch, n, width), 255, dtype=torch.uint8),
        "errors": torch.full((batch, columns, width), NAN, dtype=torch.float64),
        "loss": normal(batch, width).square(),
    }
    return Block(**{k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in values.items()})


def make_blocks(blocks):
    """Blocks of one each with factors, orders and groups of their own, as one."""
    own = ("factor", "group", "channel", "gain", "damping")
    return Block(
        **{
            name: (torch.stack if name in own else torch.cat)([getattr(block, name) for block in blocks])
            for name in vars(blocks[0])
        }
    )


@dataclass
class Grids:
    """The arguments of clipping_errors."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    spread: Tensor
    gain: Tensor


def make_grids(rows, groups, size, bits, alternatives=4, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, groups * size, generator=generator, dtype=torch.float64)
    scales = torch.rand(1, rows, groups, generator=generator, dtype=torch.float64) + 0.5
    scales = scales * torch.linspace(1, 0.5, alternatives, dtype=torch.float64)[:, None, None] * 4 / 2**bits
    zeros = torch.randint(1, 2**bits, scales.shape, generator=generator).double()
    spread, gain = torch.rand(2, groups * size, generator=generator, dtype=torch.float64)
    return Grids(*(t.to(device, dtype).contiguous() for t in (weight, scales, zeros, spread, gain)))
