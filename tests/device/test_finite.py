"""NaN and infinity in tensors of every dtype."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.device.finite import all_finite, any_nan

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
def test_one_value_in_any_place_is_found(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plain = torch.full(shape, 2.0).to(dtype)
    assert all_finite(plain) and not any_nan(plain)
    for place in range(plain.numel()):
        values = torch.full(shape, 2.0)
        values.view(-1)[place] = float("nan")
        assert any_nan(values.to(dtype)) and not all_finite(values.to(dtype))
        values.view(-1)[place] = float("-inf")
        if dtype is not torch.float8_e4m3fn:  # which has no infinity
            assert not all_finite(values.to(dtype)) and not any_nan(values.to(dtype))


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.ones(3, dtype=torch.int8), torch.ones(2, dtype=torch.bool)])
def test_nothing_and_whole_numbers_are_finite(tensor: torch.Tensor) -> None:
    assert all_finite(tensor) and not any_nan(tensor)


def test_values_whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((100,), 60000.0, dtype=torch.float16))
