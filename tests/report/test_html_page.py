"""report.html: one page that stands alone, shows every module, and takes any name for what it is: text."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.report.figures import packed_bytes
from gptq_plugin.report.html_page import report_page
from gptq_plugin.report.numbers import size
from gptq_plugin.report.report import ModuleReport, QuantizeReport

HOSTILE = "a<script>alert(1)</script>.\"'&.0"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The page's tags, balanced or it raises, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def within(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    def marks(self, kind: str) -> list[dict[str, Any]]:
        """The circles of a kind, without the legend's."""
        return [attributes for tag, attributes in self.tags if tag == "circle" and attributes["class"] == kind][1:]


def module(name: str, loss: float = 0.02, rtn_loss: float = 0.05, **other: Any) -> ModuleReport:
    return ModuleReport(name, "gptq", 3, 16, (20, 48), loss, rtn_loss, 640, 0.01, 0.25, **other)


def report(*modules: ModuleReport, **other: Any) -> QuantizeReport:
    return QuantizeReport(QuantizeConfig(bits=3, group_size=16), list(modules), 40, 640, **other)


@pytest.mark.parametrize("blocks", [1, 57])
def test_every_module_is_in_the_chart_and_in_the_table(blocks: int) -> None:
    names = [f"layers.{block}.{part}" for block in range(blocks) for part in ("q", "k", "v", "o", "gate", "up", "down")]
    page = Page(report_page(report(*map(module, names)), "model"))
    assert [text for text in page.within("td") if text in names] == names
    drawn = [text.partition(":")[0] for text in page.within("title")[1:]]
    assert sorted(drawn) == sorted(names)
    assert len(page.marks("gptq")) == len(page.marks("rtn")) == 7 * blocks
    height = next(int(a["height"]) for tag, a in page.tags if tag == "svg" and a.get("class") == "chart")
    assert height < 2000


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = report_page(report(module("a"), metrics={"val_loss": {"float": 2.0, "gptq": 2.1}}), "model")
    assert not re.search(r"http|src=|href=|url\(|@import|<script|<link", page)
    assert page.startswith("<!DOCTYPE html>") and "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_names_deviations_and_other_texts_are_shown_and_never_markup() -> None:
    text = report_page(
        report(
            module(HOSTILE, deviations=(HOSTILE,)),
            ModuleReport("head", "float", None, None, (20, 48), reason=HOSTILE),
            deviations=[HOSTILE],
            calibration=HOSTILE,
            metrics={HOSTILE: {"float": 1.0, HOSTILE: 2.0}},
            seconds={HOSTILE: 1.0},
        ),
        HOSTILE,
    )
    assert "<script" not in text
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert page.within("h1") == [HOSTILE] and page.within("title")[0] == HOSTILE
    assert page.within("li") == [HOSTILE, f"{HOSTILE}: {HOSTILE}"]
    assert page.within("td").count(HOSTILE) == 7  # a name, a deviation, a reason, a metric twice, its model, a phase


def test_the_chart_is_logarithmic_and_says_so() -> None:
    page = Page(report_page(report(module("a", 0.001, 0.01), module("b", 0.1, 1.0)), "model"))
    a, b = (float(mark["cx"].rstrip("%")) for mark in page.marks("gptq"))
    rtn_a, rtn_b = (float(mark["cx"].rstrip("%")) for mark in page.marks("rtn"))
    assert rtn_a - a == pytest.approx(b - rtn_a, abs=0.02) == pytest.approx(rtn_b - b, abs=0.02)
    labels = [text for text in page.within("text") if re.fullmatch(r"[\d.]+", text)]
    assert labels == ["0.001", "0.001", "0.01", "0.01", "0.1", "0.1", "1", "1"]
    assert "loss (logarithmic)" in page.within("text")
    assert "Loss of every module" in page.within("strong")


@pytest.mark.parametrize("losses", [(1e-300, 1e300), (0.5, 0.5), (3e-7, 4e-7), (0.0, 0.1), (0.0, 0.0), (1.0, math.inf)])
def test_any_losses_have_a_place_within_the_chart(losses: tuple[float, float]) -> None:
    page = Page(report_page(report(module("a", *losses), module("b", *losses)), "model"))
    places = [float(mark["cx"].rstrip("%")) for kind in ("gptq", "rtn") for mark in page.marks(kind)]
    assert all(0 <= place <= 100 for place in places)
    assert len([text for text in page.within("text") if re.fullmatch(r"[\d.·⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", text)]) < 40


def test_figures_that_are_unknown_are_blank() -> None:
    unknown = ModuleReport("never.calibrated", "rtn", 3, 16, (20, 48))
    text = report_page(
        report(module("a"), unknown, metrics={"val_loss": {"float": math.nan, "gptq": math.nan}}), "model"
    )
    page = Page(text)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert "1 without a known loss is not drawn" in text
    assert len(page.marks("gptq")) == 1 and page.within("td").count("never.calibrated") == 1
    Page(report_page(report(), "nothing at all"))
    assert "nothing was calibrated" in report_page(report(unknown), "model")


def test_metrics_are_shown_before_and_after_with_their_differences() -> None:
    metrics = {"val_loss": {"gptq": 2.55, "float": 2.5, "rtn": 3.0}, "zero": {"float": 0.0, "gptq": 0.25}}
    page = Page(report_page(report(module("a"), metrics=metrics), "model"))
    cells = page.within("td")
    start = cells.index("val_loss")
    assert cells[start : start + 18] == [
        *("val_loss", "float", "2.5"),
        *("val_loss", "GPTQ", "2.55", "+0.05", "+2.00 %"),
        *("val_loss", "round-to-nearest", "3", "+0.5", "+20.00 %"),
        *("zero", "float", "0", "zero", "GPTQ"),
    ]
    assert "2.5 → 2.55" in page.within("b")


def test_deviations_come_before_the_tables_and_their_absence_is_said() -> None:
    said = report_page(
        report(module("a", deviations=("damping raised",)), deviations=["a sample was dropped"]), "model"
    )
    assert Page(said).within("li") == ["a sample was dropped", "a: damping raised"]
    assert said.index("a sample was dropped") < said.index("<table")
    assert "Nothing differed from what was asked." in report_page(report(module("a")), "model")


def test_a_layer_worse_than_round_to_nearest_stands_out() -> None:
    page = report_page(report(module("good", 0.02, 0.05), module("bad", 0.06, 0.05)), "model")
    assert re.findall(r"<td class='worse'>([\d.]+)<", page) == ["1.2"]


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 48), (4, -1), (8, 24)])
def test_the_size_of_the_quantized_weights_is_that_of_their_tensors(bits: int, group_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    quantizer = QuantizeModule(bits=bits, group_size=group_size)
    result = quantizer.round_to_nearest(model)
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    stored = sum(t.nbytes for t in (layer.qweight, layer.qzeros, layer.scales, layer.g_idx))
    assert packed_bytes(result.modules[0]) == stored
    assert size(stored) in report_page(result, "model")
    assert packed_bytes(dataclasses.replace(result.modules[0], method="float", bits=None, group_size=None)) == 0
