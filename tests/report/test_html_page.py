"""report.html: one page that stands alone, shows every module, and takes any name for what it is: text."""

from __future__ import annotations

import math
import re

import pytest
import torch
from reports import Page, module, report
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.report.html_page import report_page
from gptq_plugin.report.numbers import format_bytes
from gptq_plugin.report.report import ModuleReport

HOSTILE = "a<script>alert(1)</script>.\"'&.0"


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
    assert "No differences from the request." in report_page(report(module("a")), "model")


def test_a_layer_worse_than_round_to_nearest_stands_out() -> None:
    page = report_page(report(module("good", 0.02, 0.05), module("bad", 0.06, 0.05)), "model")
    assert re.findall(r"<td class='worse'>([\d.]+)<", page) == ["1.2"]


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 48), (4, -1), (8, 24)])
def test_the_size_of_the_quantized_weights_is_that_of_their_tensors(bits: int, group_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    result = QuantizeModule(bits=bits, group_size=group_size).round_to_nearest(model)
    stored = sum(tensor.nbytes for tensor in (model[0].qweight, model[0].qzeros, model[0].scales))
    page = Page(report_page(result, "model"))
    assert page.within("b")[2] == format_bytes(stored)
    assert f"{8 * stored / (96 * 64):.2f} bits per weight (scales and zeros included, g_idx not)" in page.within("span")
