"""The rule that chooses a kernel where nothing was measured: as it was fitted on an H100."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels.product import rule
from gptq_plugin.kernels.product.choice import Choice
from gptq_plugin.kernels.product.layout import Layout
from gptq_plugin.kernels.product.registry import fits
from gptq_plugin.kernels.product.rule import by_rule

from gpus import A100, GPUS, H100, L4

NARROW = "many_rows BN=64 BM=64 STAGES=4 JOINED=4 AHEAD=4 SPLIT=1 EARLY=1"
SIZES = [(4096, 4096), (14336, 4096), (8192, 28672), (1000, 37), (64, 64)]


def chosen(rows, n_in=4096, n_out=4096, bits=4, group=128, dtype=torch.float16, gpu=H100):
    return str(by_rule(Layout.of(bits, group, n_in, n_out, True), rows, dtype, gpu))


def test_on_an_h100_the_choice_is_what_was_fastest_there():
    assert chosen(1) == "one_row CHUNKS=64 EARLY=1" and chosen(1, n_out=1024) == "one_row CHUNKS=128 EARLY=1"
    assert chosen(4) == chosen(1, bits=8) == "by_warps BN=16 BM=8 WAYS=4 STAGES=3 EARLY=1"
    assert chosen(4, gpu=A100) == "few_rows BN=32 BM=8 SPLIT=4 STAGES=3 warps=2 EARLY=0"
    assert chosen(16) == "few_rows BN=64 BM=16 SPLIT=4 STAGES=3 warps=2 EARLY=0"
    assert chosen(64) == "few_rows BN=64 BM=64 SPLIT=4 STAGES=3 warps=4 EARLY=1"
    assert chosen(32) == "few_rows BN=64 BM=32 SPLIT=4 STAGES=4 warps=4 EARLY=0"
    assert chosen(256) == chosen(64, n_out=14336) == NARROW
    assert chosen(2048) == chosen(256, 8192, 28672) == "many_rows BM=256 STAGES=5 AHEAD=2 WIDTH=2"
    assert chosen(1, n_out=14336) == "few_rows BN=64 BM=8 SPLIT=1 STAGES=5 warps=2 EARLY=1"
    assert chosen(1, n_out=14336, bits=8) == "few_rows BN=64 BM=8 SPLIT=1 STAGES=3 warps=2 EARLY=1"
    assert chosen(1, 8192, 28672, bits=3) == "few_rows BN=64 BM=8 SPLIT=1 STAGES=3 warps=2 EARLY=1"


def test_of_2_and_3_bits_the_choice_is_what_was_fastest_there_too():
    halves = "few_rows BN=64 BM=64 SPLIT=4 STAGES=3 warps=4 EARLY=1 HALF=1"
    assert chosen(64, bits=2) == halves and chosen(64, bits=3) == f"{halves} JOINED=2"
    assert chosen(16, bits=3) == "few_rows BN=64 BM=16 SPLIT=4 STAGES=3 warps=4 EARLY=0 HALF=1 JOINED=2"
    assert chosen(16, n_out=14336, bits=3) == "few_rows BN=64 BM=16 SPLIT=1 STAGES=3 warps=4 EARLY=1 JOINED=2"
    assert chosen(32, n_out=14336, bits=3) == "few_rows BN=64 BM=32 SPLIT=1 STAGES=4 warps=4 EARLY=1 HALF=1 JOINED=2"
    assert chosen(16, bits=2) == "few_rows BN=64 BM=16 SPLIT=4 STAGES=3 warps=2 EARLY=0"
    assert "JOINED" not in chosen(16, bits=3, group=32) + chosen(16, bits=3, gpu=A100) + chosen(4, bits=3)
    for bits in (2, 3):
        assert chosen(256, bits=bits) == chosen(64, n_out=14336, bits=bits) == NARROW
        assert chosen(256, 14336, bits=bits) == "many_rows BM=128 STAGES=8 AHEAD=3 WIDTH=2 SPLIT=2 EARLY=1"
        assert chosen(2048, bits=bits) == chosen(256, 8192, 28672, bits=bits) == chosen(2048)


def test_64_rows_have_wide_tiles_where_these_keep_the_processors_at_work():
    for bits in (2, 3, 4):
        shape, groups = ("BN=128", "") if bits == 4 else ("BN=64", " GROUPS=4")
        expected = f"many_rows {shape} BM=64 STAGES=3 JOINED=4 AHEAD=3 SPLIT=1 EARLY=1{groups}"
        assert chosen(64, 8192, 28672, bits=bits) == expected
        assert "BN=128" not in chosen(64, 8192, 256 * 150, bits=bits) + chosen(32, 8192, 28672, bits=bits)
    assert chosen(64, 8192, 28672, gpu=A100).startswith("few_rows") and "few" in chosen(64, 8192, 28672, bits=8)


def test_65_to_128_rows_have_no_tiles_that_half_of_the_rows_would_fill():
    medium = "many_rows BM=128 STAGES=8 AHEAD=3 WIDTH=2 EARLY=1"
    for bits in (2, 3, 4):
        assert chosen(65, n_out=14336, bits=bits) == chosen(128, n_out=11008, bits=bits) == medium
        assert chosen(128, 8192, 28672, bits=bits) == medium.replace("EARLY", "SPLIT=2 EARLY")
        assert chosen(192, 8192, 28672, bits=bits) == chosen(2048, bits=bits)
    assert chosen(128, gpu=A100) == chosen(128, 8192, 28672, bits=8) == "dense"
    for size in SIZES:
        assert "BM=256" not in chosen(128, *size)


def test_3_bits_are_taken_by_halves_where_whole_steps_spill():
    assert chosen(1, bits=3, gpu=A100).endswith("EARLY=0 HALF=1") and "HALF" not in chosen(1, bits=3)
    assert not any("HALF" in chosen(rows, bits=3, dtype=torch.float32) for rows in (1, 16, 64))
    assert not any("HALF" in chosen(rows, bits=2, group=32) for rows in (1, 16, 64))


def test_many_rows_are_dense_where_the_kernel_for_hopper_does_not_apply(monkeypatch):
    assert chosen(2048, gpu=A100) == chosen(65, gpu=L4) == "dense"
    assert chosen(2048, bits=8) == chosen(2048, bits=3, group=64) == chosen(2048, dtype=torch.float32) == "dense"
    assert chosen(2048, n_in=1001) == "dense"
    monkeypatch.setattr(rule, "gluon", lambda: None)
    assert chosen(2048) == "dense" and by_rule(Layout.of(4, 128, 4096, 4096, True), 2048, torch.float16, H100) == (
        Choice("dense")
    )


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_the_rule_chooses_fits(gpu, dtype):
    for size in SIZES:
        for bits in (2, 3, 4, 8):
            for group in (32, 64, 128, 10**9):
                layout = Layout.of(bits, group, *size, True)
                for rows in (1, 2, 9, 33, 64, 65, 128, 129, 256, 257, 3000):
                    choice = by_rule(layout, rows, dtype, gpu)
                    assert fits(choice, layout, rows, dtype, gpu), f"{choice} for {rows} rows of {layout}"
