"""The bytes of a tensor."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.device.raw_bytes import raw_bytes

NUMBERS = torch.arange(24, dtype=torch.int32)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 1), (1, 2)), ((1, 1), (2, 2)), ((1,), (2,)), ((4, 1), (2, 2)), ((2, 3), (1, 4)), ((), ()), ((0, 3), (3, 1))],
)
def test_they_are_those_of_the_elements_in_order_whatever_the_strides(shape, strides):
    tensor = torch.as_strided(NUMBERS, shape, strides, 3)
    assert bytes(raw_bytes(tensor).numpy().data) == tensor.numpy().tobytes()


def test_those_of_a_contiguous_tensor_are_its_own_memory_without_a_gradient():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    raw_bytes(weight)[:] = 1
    assert weight[2, 1] > 0 and not raw_bytes(weight).requires_grad


def test_every_dtype_has_some():
    for dtype in (torch.bool, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.uint16):
        assert len(raw_bytes(torch.zeros(2, 2).to(dtype))) == 4 * dtype.itemsize
