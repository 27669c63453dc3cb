"""A kernel with its options as text, and the ranges of rows that share one."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels.product.choice import ROWS, Choice, Gpu, range_of

from kernel_cases import gpu


def test_a_choice_is_read_from_its_text():
    for choice in (Choice("dense"), Choice.of("few_rows", BN=64, SPLIT=2, warps=4)):
        assert Choice.parse(str(choice)) == choice
    assert str(Choice.of("few_rows", BN=64, SPLIT=2)) == "few_rows BN=64 SPLIT=2"


@pytest.mark.parametrize(
    "text", ["", "few_rows BN", "few_rows BN=", "few_rows BN=-1", "few_rows  BN=1", "few_rows BN=1.5", "a b", "dense\n"]
)
def test_a_text_that_is_no_choice_is_refused(text):
    with pytest.raises(ValueError, match="no kernel with options"):
        Choice.parse(text)


def test_numbers_of_rows_fall_into_ranges_named_by_their_largest():
    found = {rows: range_of(rows) for rows in (1, 2, 4, 5, 8, 9, 33, 64, 65, 256, 257, 513, 1024, 1025, 10**6)}
    assert list(found.values()) == [1, 4, 4, 8, 8, 16, 64, 64, 128, 256, 512, 1024, 1024, 2048, 2048]
    assert all(range_of(rows) == rows for rows in ROWS)


@gpu
def test_a_gpu_is_described_by_what_the_driver_tells():
    found = Gpu.of(torch.device("cuda"))
    assert found == Gpu.of(torch.device("cuda", torch.cuda.current_device()))
    assert found.name and found.processors > 0 and found.shared >= 48 << 10 and found.cache >= 1 << 20
