"""The values of codes of several matrices, against the formula."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import INTERPRETED, triton_device

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]


@triton_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, n_in, rows, groups", [(3, 70, 130, 4), (1, 64, 64, 1), (5, 32, 7, 2)])
def test_values_are_codes_less_zeros_times_scales(batch, n_in, rows, groups, dtype, device):
    from gptq_plugin.kernels.values import values_of

    generator = torch.Generator().manual_seed(n_in)
    codes = torch.randint(0, 16, (batch, n_in, rows), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (batch, groups, rows), generator=generator, dtype=torch.uint8)
    scales = torch.rand(batch, groups, rows, generator=generator).half()
    g_idx = torch.randint(0, groups, (batch, n_in), generator=generator, dtype=torch.int32)
    whole = torch.empty(batch + 1, rows, n_in, dtype=dtype, device=device)
    found = whole[1:]
    values_of(*(one.to(device) for one in (codes, zeros, scales, g_idx)), found)
    group = g_idx.long()[:, :, None].expand(-1, -1, rows)
    wanted = (codes.float() - zeros.float().gather(1, group)) * scales.float().gather(1, group)
    assert torch.equal(found.cpu(), wanted.to(dtype).mT) and bool(whole[0].isnan().all())
