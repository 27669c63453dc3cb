"""Rows in blocks of one size, which follows from their number alone."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.gptq.row_blocks import divided


@pytest.mark.parametrize("rows", [1, 5, 127, 255, 256, 700, 1000, 2048, 2049, 5000])
def test_every_row_is_in_its_place_and_the_last_one_fills_what_is_left(rows):
    weight = torch.arange(rows * 3.0).view(rows, 3)
    blocks = divided(weight)
    assert torch.equal(blocks.flatten(0, 1)[:rows], weight)
    filling = blocks.flatten(0, 1)[rows:]
    assert torch.equal(filling, weight[-1:].expand_as(filling)) and len(filling) < blocks.shape[1]


@pytest.mark.parametrize(
    ("rows", "blocks", "size"),
    [(511, 1, 511), (512, 2, 256), (1536, 6, 256), (1300, 5, 288), (4352, 16, 288), (8192, 16, 512)],
)
def test_on_a_cpu_blocks_have_256_rows_or_more_and_are_16_at_most(rows, blocks, size):
    assert divided(torch.empty(rows, 2)).shape == (blocks, size, 2)


@pytest.mark.parametrize(
    ("rows", "blocks", "size"),
    [(1536, 1, 1536), (6144, 1, 6144), (8192, 2, 4096), (28672, 4, 7168), (128256, 4, 32064)],
)
def test_on_other_devices_they_have_4096_or_more_and_are_4_at_most(rows, blocks, size):
    assert divided(torch.empty(rows, 2, device="meta")).shape == (blocks, size, 2)


def test_rows_that_fill_their_blocks_are_not_copied():
    weight = torch.randn(512, 3)
    assert divided(weight).data_ptr() == weight.data_ptr()
