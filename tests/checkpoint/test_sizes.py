"""Bytes of a layer in an exported file."""

from __future__ import annotations

import pytest

from gptq_plugin import QuantizeConfig
from gptq_plugin.checkpoint.sizes import stored_bytes


@pytest.mark.parametrize(
    "options,bits",
    [
        ({}, 4 + (16 + 4) / 128),
        ({"group_size": 32}, 4 + (16 + 4) / 32),
        ({"group_size": -1}, 4 + (16 + 4) / 256),
        ({"bits": 3, "checkpoint_format": "gptq_v2"}, 3 + (16 + 3) / 128),
        ({"checkpoint_format": "compressed-tensors"}, 4 + 16 / 128),  # no zeros of symmetric grids
        ({"checkpoint_format": "compressed-tensors", "sym": False}, 4 + (16 + 4) / 128),
    ],
)
def test_codes_scales_and_zeros_count(options: dict, bits: float) -> None:
    assert 8 * stored_bytes((64, 256), QuantizeConfig(**options)) / (64 * 256) == pytest.approx(bits)


def test_a_group_that_is_not_full_counts_whole_and_words_are() -> None:
    # 5 outputs, 40 inputs in groups of 32: 5 words a row of codes, 2 groups of 5 scales and of one word of zeros
    assert stored_bytes((5, 40), QuantizeConfig(group_size=32)) == 4 * 5 * 5 + 2 * 2 * 5 + 4 * 2
