"""The choices that are measured: a dozen at most, the rule's first, all of them sensible."""

from __future__ import annotations

import itertools

import pytest
import torch
from gptq_plugin.kernels.product import registry
from gptq_plugin.kernels.product.candidates import MOST, candidates
from gptq_plugin.kernels.product.choice import ROWS, Choice
from gptq_plugin.kernels.product.layout import Layout
from gptq_plugin.kernels.product.registry import KERNELS, Kernel, fits
from gptq_plugin.kernels.product.rule import by_rule

from gpus import A100, GPUS, H100

SIZES = [(4096, 4096), (14336, 4096), (8192, 28672), (1000, 37), (64, 64)]


def of(rows, n_in=4096, n_out=4096, bits=4, group=128, dtype=torch.float16, gpu=H100):
    return candidates(Layout.of(bits, group, n_in, n_out, True), rows, dtype, gpu)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_there_are_a_dozen_at_most_the_rules_first_and_each_fits(gpu, bits):
    for size, group, symmetric, rows, dtype in itertools.product(
        SIZES, (32, 64, 128, 10**9), (True, False), ROWS, (torch.float16, torch.bfloat16, torch.float32)
    ):
        layout = Layout.of(bits, group, *size, symmetric)
        found = candidates(layout, rows, dtype, gpu)
        assert found[0] == by_rule(layout, rows, dtype, gpu)
        assert 1 <= len(found) == len(set(found)) <= MOST == 12
        assert all(fits(choice, layout, rows, dtype, gpu) for choice in found)
        assert all(set(dict(choice.options)) <= set(KERNELS[choice.kernel].options) for choice in found)


def test_few_rows_try_other_tiles_splits_stages_and_warps_of_the_same_kernel():
    assert {choice.kernel for choice in of(1, n_out=14336)} == {"one_row", "few_rows", "by_warps", "many_rows"}
    assert Choice("by_bytes") in of(1, n_out=14336, bits=2)
    found = of(4, n_out=14336)
    assert {choice.kernel for choice in found} == {"few_rows", "by_warps", "many_rows"} and len(found) >= 8
    assert not any(choice.kernel == "many_rows" for choice in of(4, gpu=A100))
    for option in ("BN", "SPLIT", "STAGES", "warps"):
        assert len({dict(choice.options).get(option) for choice in found if choice.kernel == "few_rows"}) > 1, option


def test_two_planes_at_a_time_are_tried_for_more_than_eight_rows():
    joined = {rows: [choice for choice in of(rows) if "JOINED=2" in str(choice)] for rows in (8, 16, 32)}
    assert not joined[8] and len(joined[16]) == len(joined[32]) == 1
    assert not any("JOINED" in str(choice) for choice in of(16, bits=8) + of(16, gpu=A100) + of(16, group=64))


@pytest.mark.parametrize("rows", [64, 128, 256])
def test_between_few_and_many_rows_every_kernel_is_tried(rows):
    assert {choice.kernel for choice in of(rows)} == {"few_rows", "many_rows", "dense"}
    assert {choice.kernel for choice in of(rows, gpu=A100)} == {"few_rows", "dense"}
    assert {choice.kernel for choice in of(rows, bits=8)} == {"few_rows", "dense"}


def test_many_rows_are_left_to_the_kernels_for_them():
    assert {choice.kernel for choice in of(2048)} == {"many_rows", "dense"}
    assert of(2048, bits=3) == of(2048, bits=2) == of(2048)
    assert of(2048, gpu=A100) == of(1024, bits=8) == [Choice("dense")]


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("bits", [2, 3])
def test_few_rows_of_2_and_3_bits_are_tried_by_halves_of_a_step_and_by_whole_ones(bits, rows):
    assert {dict(choice.options).get("HALF", 0) for choice in of(rows, bits=bits)} == {0, 1}
    assert not any("HALF" in str(choice) for choice in of(rows))


def test_3_bits_are_tried_by_whole_steps_with_half_as_many_programs():
    """What was fastest at 4096×4096 on an H200, but for how early the next product begins."""
    for rows in (32, 64, 128):
        fastest = f"few_rows BN=64 BM={min(rows, 64)} SPLIT={2 if rows < 128 else 1}"
        whole = [str(choice) for choice in of(rows, bits=3) if "HALF" not in str(choice)]
        assert any(text.startswith(fastest) and text.endswith("JOINED=2") for text in whole), rows


def test_a_further_kernel_is_tried_once_it_is_registered(monkeypatch):
    def gemv(x, layout, arranged, bias, out, workspace, *, BN: int = 4):
        """Writes nothing."""

    def few_enough(layout, rows, dtype, gpu, options):
        return rows == 1 and options["BN"] < 10

    def near(layout, rows, dtype, gpu):
        yield from ({"BN": number} for number in (4, 8, 16))

    monkeypatch.setitem(registry.KERNELS, "gemv", Kernel(gemv, few_enough, near))
    assert {Choice.of("gemv", BN=4), Choice.of("gemv", BN=8)} < set(of(1))
    assert "gemv BN=16" not in map(str, of(1)) and not any("gemv" in str(choice) for choice in of(4))
