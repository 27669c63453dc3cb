"""The Triton pass that adds products against the plain one."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_sums

from kernel_cases import triton_device


@triton_device
@pytest.mark.parametrize(("n", "start", "stop"), [(1, 0, 1), (33, 0, 33), (70, 33, 66), (2300, 2290, 2300)])
def test_the_triton_sum_is_the_plain_one_to_the_bit(n, start, stop, device):
    from gptq_plugin.kernels import sums

    scales = torch.logspace(-8, 8, n)
    totals = [torch.zeros(stop - start, stop, dtype=torch.float64, device=device) for _ in range(2)]
    for number in range(3):
        x = torch.randn(40, n, generator=torch.Generator().manual_seed(number)) * scales
        x[:, n // 2] *= number == 2  # a channel that is dead in two of them
        product = (x.T @ x).to(device)
        rows, diagonal = product[start:stop, :stop].contiguous(), product.diagonal().contiguous()
        for total, module in zip(totals, (sums, plain_sums), strict=True):
            module.add_product(total, rows, diagonal, start)
    assert torch.equal(*totals) and totals[0].any()


@triton_device
def test_the_triton_sum_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import sums

    total, product, diagonal = (torch.zeros(*shape, device=device) for shape in ((3, 4), (3, 4), (4,)))
    with pytest.raises(ValueError, match="total must be contiguous torch.float64"):
        sums.add_product(total, product, diagonal, 0)
    with pytest.raises(ValueError, match="product must be contiguous torch.float32"):
        sums.add_product(total.double(), product.double(), diagonal, 0)
    with pytest.raises(ValueError, match="diagonal must be .* fit rows 2 to 5 of 4 columns"):
        sums.add_product(total.double(), product, diagonal, 2)
