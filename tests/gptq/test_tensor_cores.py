"""float32 products of numbers split into float16 parts."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.device.precision import full_precision
from gptq_plugin.gptq import tensor_cores

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


@devices
def test_products_of_split_numbers_are_nearly_as_accurate_as_float32s(device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, *shape, generator=generator).to(device) for shape in ((64, 512), (512, 96)))
    start = torch.randn(2, 64, 96, generator=generator).to(device)
    wanted = start.double() - 2 * a.double() @ b.double()
    with full_precision(a.device):
        out = start.clone()
        tensor_cores.add_product(
            out, tensor_cores.left_operand(a, 16.0), tensor_cores.right_operand(b, 4096.0), alpha=-2 / 65536
        )
        assert (out.double() - wanted).norm() / wanted.norm() < 5e-6  # TF32 alone: about 3e-4
        transposed, same = tensor_cores.gram_operands(b, 4096.0)
        gram = torch.zeros(2, 96, 96, device=device)
        tensor_cores.add_product(gram, transposed, same, alpha=4096.0**-2)
    wanted = b.double().mT @ b.double()
    assert (gram.double() - wanted).norm() / wanted.norm() < 5e-6


@devices
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_numbers_of_any_size_are_accurate_for_each_row_and_column(transposed, device, monkeypatch):
    monkeypatch.setattr(tensor_cores, "usable", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(tensor_cores, "_DEPTH", 64)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, *shape, generator=generator) for shape in ((150, 33), (150, 20)))
    a *= torch.logspace(-20, 12, 33)
    b *= torch.logspace(9, -20, 20)
    a[0, :, 3], b[1, :, 4] = 0, 0
    left, right = a.mT, b
    if transposed:  # in memory
        left, right = left.contiguous(), right.mT.contiguous().mT
    left, right = left.to(device), right.to(device)
    with full_precision(left.device):
        found = tensor_cores.accurate_product(left, right).cpu().double()
    wanted = a.double().mT @ b.double()
    sizes = a.double().norm(dim=1)[:, :, None] * b.double().norm(dim=1)[:, None]
    assert bool(((found - wanted).abs() <= 2e-6 * sizes).all())
    slices = [tensor_cores.accurate_product(left[:, 5:9], right[:, :, some]) for some in (slice(3), slice(3, None))]
    torch.testing.assert_close(torch.cat(slices, 2).cpu().double(), wanted[:, 5:9], rtol=1e-3, atol=0)


def test_the_largest_number_that_can_be_split_is_below_float16s_end():
    largest = torch.tensor([tensor_cores.LARGEST, 2 * tensor_cores.LARGEST]).half()
    assert largest.isfinite().tolist() == [True, False]


def test_only_float32_on_a_gpu_is_split():
    for device in ("cpu", "meta"):
        assert not tensor_cores.usable(torch.empty(1, device=device))
        assert not tensor_cores.usable(torch.empty(1, device=device, dtype=torch.float64))
