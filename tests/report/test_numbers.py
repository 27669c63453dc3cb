"""Numbers and tables as people read them."""

from __future__ import annotations

import math

import pytest

from gptq_plugin.report.numbers import (
    align,
    format_bits_per_weight,
    format_bytes,
    format_change,
    format_percent,
    format_share,
    format_value,
)


@pytest.mark.parametrize(
    ("count", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (123_456, "123 kB"),
        (1_000_000, "1 MB"),
        (16_060_000_000, "16.1 GB"),
        (1_500_000_000_000, "1.5e+03 GB"),
    ],
)
def test_a_number_of_bytes_has_three_digits_and_a_decimal_unit(count: int, written: str) -> None:
    assert format_bytes(count) == written


def test_a_figure_has_so_many_significant_digits() -> None:
    assert (format_value(0.0123456), format_value(1234567.0), format_value(2.0), format_value(0.0123456, 2)) == (
        "0.01235",
        "1.235e+06",
        "2",
        "0.012",
    )


def test_changes_have_their_sign() -> None:
    assert (format_change(0.05), format_change(-1234.5), format_change(0.0)) == ("+0.05", "-1.23e+03", "+0")
    assert (format_percent(0.02), format_percent(-0.12345), format_percent(0.0)) == ("+2.00 %", "-12.35 %", "+0.00 %")
    assert (format_percent(-3.9e-5), format_percent(5e-5), format_percent(2e-9)) == ("-0.004 %", "+0.01 %", "+2e-07 %")
    assert [format_share(share) for share in (0.0, 1.0, 0.01234, 3.57e-4, 2.5e-9)] == [
        *("0 %", "100 %", "1.23 %", "0.0357 %", "2.5e-07 %"),
    ]


def test_unknown_figures_are_blank() -> None:
    assert format_value(math.nan) == format_change(math.nan) == format_percent(math.nan) == format_share(math.nan) == ""


def test_an_average_width_names_what_is_counted() -> None:
    assert format_bits_per_weight(4.15625) == "4.16 bits per weight (scales and zeros included, g_idx not)"


def test_columns_of_numbers_are_flush_right_and_those_of_words_flush_left() -> None:
    rows = [("module", "loss", "s"), ("a", "0.25", "12"), ("layers.0", "", "1.5")]
    assert align(rows) == ["module    loss    s", "a         0.25   12", "layers.0        1.5"]
    assert align(rows, numeric=False) == ["module    loss  s", "a         0.25  12", "layers.0        1.5"]
    assert align([]) == []
