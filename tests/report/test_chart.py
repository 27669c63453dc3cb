"""The chart of errors: every module at its place on a logarithmic axis."""

from __future__ import annotations

import math
import re

import pytest
from reports import Page, module

from gptq_plugin.report.chart import error_chart
from gptq_plugin.report.module_report import ModuleReport


def test_the_chart_is_logarithmic_and_labelled_so() -> None:
    page = Page(error_chart([module("a", 0.001, 0.01), module("b", 0.1, 1.0)]))
    a, b = (float(mark["cx"].rstrip("%")) for mark in page.marks("gptq"))
    rtn_a, rtn_b = (float(mark["cx"].rstrip("%")) for mark in page.marks("rtn"))
    assert rtn_a - a == pytest.approx(b - rtn_a, abs=0.02) == pytest.approx(rtn_b - b, abs=0.02)
    labels = [text for text in page.within("text") if re.fullmatch(r"[\d.]+", text)]
    assert labels == ["0.001", "0.001", "0.01", "0.01", "0.1", "0.1", "1", "1"]
    assert "loss (logarithmic)" in page.within("text")
    assert "Loss of every module" in page.within("strong")


@pytest.mark.parametrize("losses", [(1e-300, 1e300), (0.5, 0.5), (3e-7, 4e-7), (0.0, 0.1), (0.0, 0.0), (1.0, math.inf)])
def test_any_losses_have_a_place_within_the_chart(losses: tuple[float, float]) -> None:
    page = Page(error_chart([module("a", *losses), module("b", *losses)]))
    places = [float(mark["cx"].rstrip("%")) for kind in ("gptq", "rtn") for mark in page.marks(kind)]
    assert all(0 <= place <= 100 for place in places)
    assert len([text for text in page.within("text") if re.fullmatch(r"[\d.·⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", text)]) < 40


def places(page: Page, kind: str) -> list[float]:
    return [float(mark["cx"].rstrip("%")) for mark in page.marks(kind)]


def heights(page: Page) -> list[float]:
    return [float(mark["cy"]) for mark in page.marks("gptq")]


def ticks(page: Page) -> list[str]:
    """The labels of the upper axis."""
    return [text for text in page.within("text") if re.fullmatch(r"[\d.·⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", text)][::2]


def test_modules_of_one_kind_share_a_band_in_the_models_order() -> None:
    names = ["layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up", "head"]
    page = Page(error_chart([module(name) for name in names]))
    bands = [text for text in page.within("text") if text.rstrip() in ("layers.*.q", "layers.*.up", "head")]
    assert [band.rstrip() for band in bands] == ["layers.*.q", "layers.*.up", "head"]
    assert page.within("tspan") == ["2 modules", "2 modules"]
    drawn = [text.partition(":")[0] for text in page.within("title")]
    assert drawn == ["layers.0.q", "layers.1.q", "layers.0.up", "layers.1.up", "head"]
    assert heights(page) == sorted(heights(page)) and len(set(heights(page))) == 5


def test_a_smaller_loss_stands_further_left_and_its_figures_are_the_tooltip() -> None:
    page = Page(error_chart([module("a", 0.5, 2.0), module("b", 0.1, 0.2)]))
    (a, b), (rtn_a, rtn_b) = places(page, "gptq"), places(page, "rtn")
    assert b < rtn_b < a < rtn_a
    assert (b, rtn_a) == (4.0, 96.0)
    assert page.within("title") == ["a: 0.5, round-to-nearest 2", "b: 0.1, round-to-nearest 0.2"]


def test_relative_errors_are_shown_if_all_are_known_so_that_layers_compare() -> None:
    modules = [module("a", 0.5, 2.0, output_power=50.0), module("b", 0.1, 0.2, output_power=1.0)]
    page = Page(error_chart(modules))
    (a, b), (rtn_a, rtn_b) = places(page, "gptq"), places(page, "rtn")
    assert (a, rtn_b) == (4.0, 96.0) and a < rtn_a < b < rtn_b
    assert page.within("title") == ["a: 1 %, round-to-nearest 4 %", "b: 10 %, round-to-nearest 20 %"]
    assert [text for text in page.within("text") if text.endswith("%")][::2] == ["1 %", "2 %", "5 %", "10 %", "20 %"]
    assert "relative error (logarithmic)" in page.within("text") and "Relative error of" in page.within("strong")[0]
    assert "loss (logarithmic)" in Page(error_chart([*modules, module("c")])).within("text")  # one is unknown


def test_bits_are_shown_by_module_kind_and_colour_if_they_differ() -> None:
    wide = ModuleReport("layers.1.q", "gptq", 8, 16, (20, 48), 0.01, 0.02)
    page = Page(error_chart([module("layers.0.q"), wide, module("layers.0.up"), module("layers.2.q")]))
    coloured = [attributes["class"] for tag, attributes in page.tags if tag == "rect" and attributes["class"] != "hit"]
    assert coloured == ["bits3", "bits8", "bits3", "bits8", "bits3", "bits3"]  # two of the legend's
    assert page.within("tspan") == ["3 modules, bits: 3 (2), 8 (1)", "bits: 3"]
    assert page.within("title")[1].endswith(", 8 bits") and " 8 bits" in page.within("span")
    alike = Page(error_chart([module("layers.0.q"), module("layers.1.q")]))
    assert not [a for tag, a in alike.tags if tag == "rect" and a["class"] != "hit"]
    assert "bits" not in " ".join(alike.within("tspan") + alike.within("title"))


def test_labels_are_broken_to_lines_that_fit_a_phone() -> None:
    long = "model.language_model.layers.{}.block_sparse_moe.experts.gate_up_projection"
    page = Page(error_chart([module(long.format(n)) for n in range(3)]))
    labels = [text for text in page.within("text") if "model" in text or "projection" in text]
    assert labels == ["model.language_model.layers.*.block_sparse_moe.", "experts.gate_up_projection "]
    assert page.within("tspan") == ["3 modules"]
    crowded = Page(error_chart([module(f"model.layers.{n}.block_sparse_moe.experts.w1") for n in range(3)]))
    assert max(map(len, crowded.within("text"))) <= 54


def test_a_loss_of_zero_stands_at_the_left_end() -> None:
    assert places(Page(error_chart([module("a", 0.0, 0.1), module("b", 0.01, 0.1)])), "gptq") == [4.0, 4.0]


@pytest.mark.parametrize(
    ("losses", "labels"),
    [
        ((1e-5, 1.0), ["10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1", "1"]),
        ((1.5, 30.0), ["2", "5", "10", "20"]),
        ((1.5e-5, 1e-4), ["2·10⁻⁵", "5·10⁻⁵", "10⁻⁴"]),
        ((1e4, 1e6), ["10000", "10⁵", "10⁶"]),
    ],
)
def test_ticks_are_round_losses_within_the_range(losses: tuple[float, float], labels: list[str]) -> None:
    assert ticks(Page(error_chart([module("a", *losses)]))) == labels


def test_nearly_equal_losses_are_not_spread_over_the_whole_width() -> None:
    (one, other) = places(Page(error_chart([module("a", 0.1, 0.1), module("b", 0.101, 0.1)])), "gptq")
    assert 49 < one < other < 52


def test_modules_without_a_known_loss_are_counted_and_not_drawn() -> None:
    unknown = [ModuleReport(name, "rtn", 3, 16, (20, 48)) for name in ("b", "c")]
    chart = error_chart([module("a"), *unknown])
    assert [text.partition(":")[0] for text in Page(chart).within("title")] == ["a"]
    assert "2 without a known loss are not drawn" in chart and "loss of 1 modules" in chart
    assert error_chart(unknown) == error_chart([]) == "<p>No module's loss is known: nothing was calibrated.</p>"


def test_an_unknown_loss_of_round_to_nearest_leaves_gptqs_alone_in_its_line() -> None:
    page = Page(error_chart([module("a", 0.1, math.nan), module("b", 0.1, 0.2)]))
    assert len(page.marks("gptq")) == 2 and len(page.marks("rtn")) == 1
    assert page.within("title")[0] == "a: 0.1"
