"""The Triton product of packed weights against the formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from gptq_plugin.kernels import reference

from kernel_cases import CASES, DTYPES, INTERPRETED, TOLERANCE, Case, assert_product, make_layer, triton_device


@triton_device
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_triton_kernels_are_the_formula(case, bits, device):
    from gptq_plugin.kernels import matmul

    layer = make_layer(case, bits, device)
    # The interpreter is slow, and wrong in bfloat16: it takes each dtype and each way to find the group once.
    everything = itertools.product(DTYPES, {None, layer.group_size}, (1, 3, 17))
    a_few = ((torch.float32, None, 3), (torch.float16, layer.group_size, 3))
    for dtype, promise, rows in everything if device == "cuda" else a_few:
        weight = matmul.dequantize(*layer.packed, dtype, group_size=promise)
        assert torch.equal(weight.cpu(), layer.weight.to(dtype))
        x = torch.randn(rows, case.n_in, dtype=dtype, device=device)
        bias = torch.randn(case.n_out, dtype=dtype, device=device)
        assert_product(matmul.quant_matmul(x, *layer.packed, bias, group_size=promise), x, layer.weight, bias)


@triton_device
@pytest.mark.parametrize("rows", [1, 16, 40, 130, 300])
def test_the_triton_kernel_takes_any_number_of_rows_leading_dimension_and_stride(rows, device):
    from gptq_plugin.kernels import matmul

    layer = make_layer(Case(75, 37, 15), 3, device)
    x = torch.randn(75, rows, device=device).t()
    assert_product(matmul.quant_matmul(x, *layer.packed), x, layer.weight, None)
    batched = matmul.quant_matmul(x[None, :, None], *layer.packed)
    assert torch.equal(batched, matmul.quant_matmul(x, *layer.packed)[None, :, None])
    assert matmul.quant_matmul(x[:0], *layer.packed).shape == (0, 37)
    assert matmul.quant_matmul(x[0], *layer.packed).shape == (37,)


@triton_device
def test_the_triton_kernel_does_not_round_float32_to_tf32(device):
    from gptq_plugin.kernels import matmul

    layer = make_layer(Case(256, 33, 128), 8, device)
    x = 1 + torch.rand(5, 256, device=device) * 2**-12  # TF32 keeps 10 bits: it would see ones
    y = matmul.quant_matmul(x, *layer.packed, group_size=128)
    assert_product(y, x, layer.weight, None)


@triton_device
def test_the_triton_kernel_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import matmul

    qweight, *rest = make_layer(Case(128, 64, 32), 4, device).packed
    x = torch.zeros(1, 128, device=device)
    with pytest.raises(ValueError, match="qweight must be contiguous"):
        matmul.quant_matmul(x, qweight.t().contiguous().t(), *rest)
    with pytest.raises(ValueError, match=r"not torch\.float64: cast x"):
        matmul.quant_matmul(x.double(), qweight, *rest)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"interpreter .* computes bfloat16 wrongly"):
            matmul.quant_matmul(x.bfloat16(), qweight, *rest)


@pytest.mark.skipif(INTERPRETED, reason="asks about the compiled kernels")
def test_tensors_on_a_cpu_are_sent_to_the_plain_definition():
    pytest.importorskip("triton")
    from gptq_plugin.kernels import matmul

    layer = make_layer(Case(128, 64, 32), 4)
    with pytest.raises(ValueError, match=r"need CUDA tensors.*gptq_plugin\.kernels\.reference"):
        matmul.quant_matmul(torch.zeros(1, 128), *layer.packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 16, 64, 200, 2048])
def test_triton_on_layers_of_a_large_model(rows, bits, dtype):
    from gptq_plugin.kernels import matmul

    torch.manual_seed(0)
    n_in, n_out, groups = 4096, 11009, 32
    random = {"dtype": torch.int32, "device": "cuda"}
    qweight = torch.randint(-(2**31), 2**31 - 1, (n_in * bits // 32, n_out), **random)
    qzeros = torch.randint(-(2**31), 2**31 - 1, (groups, -(-n_out * bits // 32)), **random)
    scales = torch.rand(groups, n_out, device="cuda").half()
    g_idx = torch.arange(n_in, **random) // 128
    x = torch.randn(rows, n_in, dtype=dtype, device="cuda")
    for order, promise in ((g_idx, 128), (g_idx[torch.randperm(n_in, device="cuda")], None)):
        weight = reference.dequantize(qweight, qzeros, scales, order, bits, dtype)
        y = matmul.quant_matmul(x, qweight, qzeros, scales, order, bits, group_size=promise)
        expected = x.double() @ weight.double().t()
        assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_addresses_more_than_two_to_the_31_elements():
    from gptq_plugin.kernels import matmul

    n_in, n_out = 16384, 135_001
    qweight = torch.randint(-(2**31), 2**31 - 1, (n_in // 8, n_out), dtype=torch.int32, device="cuda")
    qzeros = torch.full((1, -(-n_out // 8)), -0x77777778, dtype=torch.int32, device="cuda")  # 0x88888888
    scales = torch.ones(1, n_out, dtype=torch.float16, device="cuda")
    g_idx = torch.zeros(n_in, dtype=torch.int32, device="cuda")
    assert n_in * n_out > 2**31
    weight = matmul.dequantize(qweight, qzeros, scales, g_idx, 4, torch.float16, group_size=n_in)
    expected = reference.unpack(qweight[-2:, -9:], 4, 16).t() - 8.0
    assert torch.equal(weight[-9:, -16:], expected.half())
