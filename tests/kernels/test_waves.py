"""Tiles of products of more than 64 rows: what was fastest on an H200, where both ways were timed."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels.product import products, waves
from gptq_plugin.kernels.product.choice import Choice, Gpu
from gptq_plugin.kernels.product.layout import Layout
from gptq_plugin.kernels.product.table import Key, Table
from gptq_plugin.kernels.product.waves import LARGE, MEDIUM, NARROW, SHARED, first_rows, tiles_for

from gpus import A100, H200


def of(n_in, n_out, bits=4):
    return Layout.of(bits, 128, n_in, n_out, True)


SQUARE, WIDE, LONG, HUGE = of(4096, 4096), of(4096, 14336), of(14336, 4096), of(8192, 28672)


@pytest.mark.parametrize(
    ("layout", "fastest"),
    [
        (SQUARE, {128: None, 192: NARROW, 256: NARROW, 320: MEDIUM, 512: MEDIUM, 1024: LARGE, 2048: LARGE}),
        (WIDE, {128: MEDIUM, 256: LARGE, 320: MEDIUM, 448: LARGE, 1024: LARGE, 2048: LARGE}),
        (LONG, {128: None, 192: SHARED, 256: SHARED, 320: MEDIUM, 512: MEDIUM, 1024: LARGE, 2048: LARGE}),
        (HUGE, {128: SHARED, 192: LARGE, 256: LARGE, 448: LARGE, 1024: LARGE, 2048: LARGE}),
    ],
    ids=lambda value: f"{value.n_in}x{value.n_out}" if isinstance(value, Layout) else "",
)
def test_tiles_are_those_that_were_fastest(layout, fastest):
    assert {rows: tiles_for(layout, rows, H200) for rows in fastest} == fastest


@pytest.mark.parametrize(
    ("layout", "apart", "whole"),
    [
        (SQUARE, {257: 256, 640: 512, 1152: 1024, 2112: 2048}, (144, 192, 256, 320, 384, 512, 1024)),
        (WIDE, {129: 128, 160: 128, 257: 256, 320: 256, 640: 512}, (200, 256, 448, 512, 1024, 1536)),
        (LONG, {129: 128, 144: 128, 272: 256, 320: 256, 640: 512, 1152: 1024}, (192, 256, 384, 512, 1024)),
        (HUGE, {129: 128, 160: 128, 192: 128, 257: 256, 384: 256, 1152: 1024}, (256, 448, 512, 1024)),
    ],
    ids=lambda value: f"{value.n_in}x{value.n_out}" if isinstance(value, Layout) else "",
)
def test_rows_that_would_leave_a_tile_nearly_empty_have_a_launch_of_their_own(layout, apart, whole):
    assert {rows: first_rows(layout, rows, H200) for rows in apart} == apart
    assert [first_rows(layout, rows, H200) for rows in whole] == list(whole)


@pytest.fixture
def launches(monkeypatch):
    def of_rows(layout, rows, dtype=torch.float16, gpu=H200):
        monkeypatch.setattr(Gpu, "of", lambda device: gpu)
        products._first.cache_clear()
        products.choose.cache_clear()
        return [number for number, _ in products.parts(layout, rows, dtype, torch.device("cuda", 0))]

    yield of_rows
    products._first.cache_clear()
    products.choose.cache_clear()


def test_a_product_has_two_launches_at_most_and_each_row_once(launches):
    for layout in (SQUARE, WIDE, LONG, HUGE, of(1000, 37), of(64, 64, 2), of(4096, 6144, 3)):
        for rows in (*range(1, 700, 9), 1000, 2092, 65537):
            found = launches(layout, rows)
            assert sum(found) == rows and all(number > 0 for number in found)
            assert len(found) == 1 or (len(found) == 2 and found[0] % waves.TOGETHER == 0 < rows - found[0] <= 128)
    assert launches(WIDE, 129) == [128, 1] and launches(WIDE, 130) == [128, 2] and launches(HUGE, 300) == [256, 44]
    assert launches(WIDE, 128) == [128] and launches(WIDE, 255) == [255]


def test_a_product_has_one_launch_where_the_kernel_for_hopper_does_not_apply(launches):
    for rows in (129, 257, 300, 2049):
        assert launches(WIDE, rows, gpu=A100) == launches(WIDE, rows, torch.float32) == [rows]
        assert launches(of(4096, 14336, 8), rows) == [rows]


def test_a_product_has_one_launch_where_its_weight_is_made_anew_for_each(launches, monkeypatch):
    assert launches(LONG, 1100) == [1024, 76]
    table = Table(H200.name, H200.processors)
    for rows in (128, 2048):
        table.choices[Key.of(LONG, rows, torch.float16)] = Choice("dense")
    monkeypatch.setattr(products, "tuned", lambda gpu: table)
    assert launches(LONG, 1100) == [1100] and launches(LONG, 129) == [128, 1]
