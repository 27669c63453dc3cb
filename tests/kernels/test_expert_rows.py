"""The product of rows that are sorted by expert, against each expert's by the formula in float64."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels.product.layout import Layout, arrange

from kernel_cases import INTERPRETED, NAN, TOLERANCE, triton_device

WIDTH = 128
CASES = [  # bits, channels, group size, zeros are all the middle, rows of the experts
    (4, 256, 128, True, (1, 0, 1, 0, 1)),
    (4, 512, 128, True, (0, 0, 3)),
    (4, 320, 64, False, (5, 0, 20, 1)),
    (3, 96, 32, True, (2, 1)),
    (8, 128, 64, False, (1, 1, 1)),
    (2, 256, 10**9, True, (4,)),
    (4, 256, 128, True, (0, 0)),
]
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]


def weights(bits, n_in, group_size, symmetric, experts, device):
    generator = torch.Generator().manual_seed(n_in + bits)
    groups, n_out = -(-n_in // group_size), experts * WIDTH
    codes = torch.randint(0, 2**bits, (n_in, n_out), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, n_out, generator=generator) + 0.1).half()
    zeros = torch.randint(0, 2**bits, (groups, n_out), generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    layout = Layout.of(bits, group_size, n_in, n_out, symmetric)
    group = torch.arange(n_in) // group_size
    value = ((codes.double() - zeros.double()[group]) * scales.double()[group]).t()
    return layout, arrange(layout, *(one.to(device) for one in (codes, scales, zeros))), value.unflatten(0, (-1, WIDTH))


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_triton_product_is_each_experts_with_its_rows(case, dtype, device):
    from gptq_plugin.kernels.product.expert_rows import expert_rows

    *shape, counts = case
    layout, arranged, values = weights(*shape, len(counts), device)
    rows, beyond = sum(counts), 2
    x = torch.randn(rows + beyond, layout.n_in).to(device, dtype)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device)
    out = torch.full((rows + beyond, WIDTH), NAN, dtype=dtype, device=device)
    expert_rows(x, ends, layout, arranged, out)
    assert out[rows:].isnan().all()  # of no expert
    if rows:
        parts = zip(x[:rows].cpu().double().split(list(counts)), values, strict=True)
        expected = torch.cat([own @ value.t() for own, value in parts])
        error = (out[:rows].cpu().double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@triton_device
def test_the_triton_product_names_what_it_cannot_take(device):
    from gptq_plugin.kernels.product.expert_rows import expert_rows

    layout, arranged, _ = weights(4, 256, 128, True, 2, device)
    x, out = torch.zeros(3, 256, device=device), torch.zeros(3, WIDTH, device=device)
    ends = torch.tensor([1, 3], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="x and out must be float16"):
        expert_rows(x.double(), ends, layout, arranged, out)
    with pytest.raises(ValueError, match="x must be contiguous"):
        expert_rows(x[:2], ends, layout, arranged, out)
    with pytest.raises(ValueError, match="ends must be contiguous int32"):
        expert_rows(x, ends.long(), layout, arranged, out)
    with pytest.raises(ValueError, match="2 experts of 64 outputs"):
        expert_rows(x, ends, layout, arranged, out[:, :64].contiguous())
