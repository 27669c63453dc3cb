"""The product of bytes is the formula, and its PTX tells codes where they lie."""

from __future__ import annotations

import random
import re

import pytest
import torch
from gptq_plugin.kernels.product.layout import Arranged, Layout, arrange, pieces

from kernel_cases import NAN, gpu, triton_device

pytest.importorskip("triton")


@pytest.mark.parametrize("product", range(4))
def test_a_products_codes_are_at_their_places_in_the_bytes_of_words(product):
    from gptq_plugin.kernels.product.by_bytes import ptx

    found = re.fullmatch(r"lop3\.b32 \$0, \$1, (\w+), (\w+), 0x28;", ptx(product))
    turned, mask = (int(number, 0) for number in found.groups())
    draw = random.Random(product)
    for _ in range(50):
        words = draw.getrandbits(32)
        for byte in range(4):
            (_, at, _, number) = pieces(2, product + 4 * (byte % 2))[0]
            code = words >> 16 * (byte // 2) + at & 2**number - 1
            value = ((words ^ turned) & mask) >> 8 * byte & 255
            expected = (code << 2 * product) - (128 if product == 3 else 0)
            assert (value - 256 if value > 127 and product == 3 else value) == expected


def weight_and_value(n_in, n_out, group_size, device):
    generator = torch.Generator().manual_seed(n_in)
    codes = torch.randint(0, 4, (n_in, n_out), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(-(-n_in // group_size), n_out, generator=generator) + 0.1).half()
    zeros = torch.full(scales.shape, 2, dtype=torch.uint8)
    value = (codes.double() - 2) * scales.double()[torch.arange(n_in) // group_size]
    layout = Layout.of(2, group_size, n_in, n_out, True)
    return layout, arrange(layout, codes.to(device), scales.to(device), zeros.to(device)), value


def multiplied(x, layout, arranged, bias=None, **options):
    from gptq_plugin.kernels.product.by_bytes import by_bytes, takes
    from gptq_plugin.kernels.product.workspace import workspace_of

    assert takes(layout, x.dtype)
    out = torch.full((len(x), layout.n_out), NAN, dtype=x.dtype, device=x.device)
    by_bytes(x, layout, arranged, bias, out, workspace_of(x.device), **options)
    return out


def error(y, x, value, bias=0.0):
    expected = x.double().cpu() @ value + bias
    return float((y.double().cpu() - expected).norm() / expected.norm())


@triton_device
@pytest.mark.parametrize(
    ("size", "options"),
    [((512, 64, 128), {}), ((1100, 70, 256), {"SPLIT": 2}), ((100, 37, 10**9), {"BN": 32, "warps": 1})],
    ids=str,
)
def test_the_product_of_bytes_is_the_formula(size, options, device):
    layout, arranged, value = weight_and_value(*size, device)
    limits = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}
    for dtype in limits if device == "cuda" else (torch.float16,):  # the interpreter is wrong in bfloat16
        x = torch.randn(1, size[0], device=device).to(dtype)
        assert error(multiplied(x, layout, arranged, **options), x, value) < limits[dtype]
        x[0, 7] = 300  # much larger than the others
        bias = torch.randn(size[1], device=device)
        y = multiplied(x, layout, arranged, bias, **options)
        assert error(y, x, value, bias.double().cpu()) < limits[dtype]


@triton_device
def test_a_row_that_is_no_number_is_none_and_a_row_of_zeros_is_zero(device):
    layout, arranged, value = weight_and_value(512, 64, 128, device)
    for number in (float("inf"), -float("inf"), NAN):
        x = torch.randn(1, 512, dtype=torch.float16, device=device)
        x[0, 3] = number
        assert multiplied(x, layout, arranged).isnan().all()
    assert (multiplied(torch.zeros(1, 512, dtype=torch.float16, device=device), layout, arranged) == 0).all()
    x = torch.full((1, 512), -65504.0, dtype=torch.float16, device=device)
    scaled = arranged._replace(scales=torch.full_like(arranged.scales, 0x00010001))  # 2^-24
    y = multiplied(x, layout, scaled)
    assert y.isfinite().all() and y.abs().max() > 0


@triton_device
def test_some_outputs_out_of_a_larger_weight_are_multiplied_where_they_lie(device):
    layout, arranged, value = weight_and_value(512, 192, 128, device)
    part = Arranged(arranged.words.narrow(1, 64, 64), arranged.scales.narrow(2, 64, 64), None)
    x = torch.randn(1, 512, dtype=torch.float16, device=device)
    y = multiplied(x, Layout.of(2, 128, 512, 64, True), part)
    assert error(y, x, value[:, 64:128]) < 3e-4


@gpu
def test_a_product_has_the_same_bytes_in_hundreds_of_runs():
    layout, arranged, value = weight_and_value(4096, 4096, 128, "cuda")
    x = torch.randn(1, 4096, dtype=torch.float16, device="cuda")
    for split in (1, 4):
        first = multiplied(x, layout, arranged, SPLIT=split)
        assert error(first, x, value) < 3e-4
        for _ in range(300):
            assert torch.equal(multiplied(x, layout, arranged, SPLIT=split), first)
