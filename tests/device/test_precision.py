"""Products are computed in full precision, whatever the caller has switched on."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.device.precision import FLOAT16, full_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tf32_allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_float16_ends_where_the_next_value_is_infinite():
    assert torch.tensor(FLOAT16, dtype=torch.float16).item() == 65504 == FLOAT16
    assert torch.tensor(FLOAT16 + 16, dtype=torch.float16).isinf()


@pytest.mark.parametrize("ends", ["normally", "with an error"])
def test_tf32_autocast_and_gradients_are_off_inside_and_as_before_afterwards(ends):
    x = torch.randn(8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            with full_precision(CPU):
                product = x @ x
                assert product.dtype == torch.float32 and not product.requires_grad
                assert torch.get_float32_matmul_precision() == "highest"
                if ends == "with an error":
                    raise KeyError("solver")
        except KeyError:
            pass
        assert torch.get_float32_matmul_precision() == "high"
        product = x @ x
        assert product.dtype == torch.bfloat16 and product.requires_grad


@pytest.mark.gpu
def test_on_a_gpu_float32_products_have_more_than_the_10_bits_of_tf32():
    torch.manual_seed(0)
    x = torch.randn(512, 512, device="cuda")
    exact = x.double() @ x.double()

    def error():
        return float(((x @ x).double() - exact).abs().max())

    with full_precision(x.device):
        full = error()
    assert full < 1e-3 < error()  # TF32, as the fixture allows
