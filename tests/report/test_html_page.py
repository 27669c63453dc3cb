"""report.html: one page that stands alone, shows every module, and takes any name for what it is: text."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from reports import Page, module, report
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.report.coverage import Coverage, FloatWeight
from gptq_plugin.report.html_page import report_page
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.numbers import format_bytes
from gptq_plugin.report.report import ExportSize

HOSTILE = "a<script>alert(1)</script>.\"'&.0"


def names(page: Page) -> list[str]:
    """The modules in the order of the table's rows."""
    return [a["data-key"] for tag, a in page.tags if tag == "td" and a.get("class") == "left" and "data-key" in a]


@pytest.mark.parametrize("blocks", [1, 57])
def test_every_module_is_in_the_chart_and_in_the_table(blocks: int) -> None:
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    modules = [f"layers.{block}.{part}" for block in range(blocks) for part in parts]
    page = Page(report_page(report(*map(module, modules)), "model"))
    assert names(page) == modules
    drawn = [text.partition(":")[0] for text in page.within("title")[1:]]
    assert sorted(drawn) == sorted(modules)
    assert len(page.marks("gptq")) == len(page.marks("rtn")) == 7 * blocks
    height = next(int(a["height"]) for tag, a in page.tags if tag == "svg" and a.get("class") == "chart")
    assert height < 2000


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = report_page(report(module("a"), metrics={"val_loss": {"float": 2.0, "gptq": 2.1}}), "model")
    assert not re.search(r"http|src=|href=|url\(|@import|fetch|import\b|<link", page)
    assert page.startswith("<!DOCTYPE html>") and "prefers-color-scheme: dark" in page
    assert "width=device-width" in page and page.count("<script") == 1


def test_names_deviations_and_other_texts_are_shown_and_never_markup() -> None:
    text = report_page(
        report(
            module(HOSTILE, deviations=(HOSTILE,)),
            ModuleReport("head", "float", None, None, (20, 48), reason=HOSTILE),
            deviations=[HOSTILE],
            calibration=HOSTILE,
            metrics={HOSTILE: {"float": 1.0, HOSTILE: 2.0}},
            seconds={HOSTILE: 1.0},
            coverage=Coverage([FloatWeight(HOSTILE, (20, 48), 9, HOSTILE)], 9, 9),
        ),
        HOSTILE,
    )
    assert text.count("<script") == 1 and "alert(1)</" not in text.replace("alert(1)&lt;/", "")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "img" not in {tag for tag, _ in page.tags}
    assert page.within("h1") == [HOSTILE] and page.within("title")[0] == HOSTILE
    assert page.within("li") == [HOSTILE, f"{HOSTILE}: {HOSTILE}"]
    assert page.within("td").count(HOSTILE) == 6  # a metric twice, its model, a phase, a reason, a parameter
    assert HOSTILE in page.within("span") and names(page)[0] == HOSTILE


# --- sizes --------------------------------------------------------------------------------------------------


def sized() -> Page:
    whole = report(module("a", stored_bytes=346_000), size=ExportSize(bytes=880_000, float_bytes=528_000))
    floats = [FloatWeight("embed.weight", (1024, 128), 500_000, "embeddings")]
    floats += [FloatWeight(f"norm.{n}", (128,), 5_600, "norms") for n in range(5)]
    whole.coverage = Coverage(floats, 2_560_000, 346_000)
    return Page(report_page(whole, "model"))


def test_the_whole_export_and_the_share_that_stays_float_are_tiles() -> None:
    page = sized()
    assert {"880 kB", "60.4%", "346 kB"} <= set(page.within("b"))
    assert "the whole export, 3.09 MB before" in page.within("span")
    assert "of the weights' bytes in the export stay float" in page.within("span")


def test_the_parts_of_the_export_add_up_to_it() -> None:
    page = sized()
    widths = [int(re.search(r"flex:(\d+)", a["style"])[1]) for tag, a in page.tags if tag == "i" and "style" in a]
    assert widths == [346_000, 528_000, 6_000] and "Size of the export: 880 kB" in page.within("h2")
    assert {"346 kB codes, scales and zeros", "528 kB float"} <= set(page.within("span"))


def test_what_stays_float_is_listed_by_reason() -> None:
    cells = sized().within("td")
    start = cells.index("embeddings")
    assert cells[start : start + 8] == [
        *("embeddings", "500 kB", "16.2%", "embed.weight"),
        *("norms", "28 kB", "0.9%", "norm.0, norm.1, norm.2, norm.3 and 1 more"),
    ]


def test_without_an_export_there_is_no_size_of_it() -> None:
    text = report_page(report(module("a")), "model")
    assert "whole export" not in text and "Size of the export" not in text and "stays float" not in text


def test_the_data_that_calibrated_is_named_with_its_digest() -> None:
    whole = report(module("a"), calibration="40 samples of the train dataloader's 90", calibration_sha256="ab" * 32)
    text = report_page(whole, "model")
    assert "Calibrated on 40 samples of the train dataloader's 90: 40 samples, 640 tokens." in html.unescape(text)
    assert "begins with abababababab." in text
    whole.tokens = 0
    assert "Rounded to nearest, without calibration." in report_page(whole, "model")


def test_figures_that_are_unknown_are_blank() -> None:
    unknown = ModuleReport("never.calibrated", "rtn", 3, 16, (20, 48))
    text = report_page(
        report(module("a"), unknown, metrics={"val_loss": {"float": math.nan, "gptq": math.nan}}), "model"
    )
    page = Page(text)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert "1 without a known loss is not drawn" in text
    assert len(page.marks("gptq")) == 1 and names(page) == ["a", "never.calibrated"]
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


def test_deviations_come_before_the_tables_and_their_absence_is_stated() -> None:
    said = report_page(
        report(module("a", deviations=("damping raised",)), deviations=["a sample was dropped"]), "model"
    )
    assert Page(said).within("li") == ["a sample was dropped", "a: damping raised"]
    assert said.index("a sample was dropped") < said.index("<table")
    assert "No differences from the request." in report_page(report(module("a")), "model")


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 48), (4, -1), (8, 24)])
def test_the_size_of_the_quantized_weights_is_that_of_their_tensors(bits: int, group_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    result = QuantizeModule(bits=bits, group_size=group_size).round_to_nearest(model)
    stored = sum(tensor.nbytes for tensor in (model[0].qweight, model[0].qzeros, model[0].scales))
    page = Page(report_page(result, "model"))
    assert format_bytes(stored) in page.within("b")
    assert f"{8 * stored / (96 * 64):.2f} bits per weight (scales and zeros included, g_idx not)" in page.within("span")


# --- in a browser -------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
SORTED = """
<script>
const names = () => [...document.querySelectorAll("table.layers tbody tr")].map(row => row.cells[0].dataset.key);
const orders = [names()];
for (const head of document.querySelectorAll("table.layers th")) {
  if (["module", "loss", "place"].includes(head.textContent)) { head.click(); orders.push(names()); }
}
const cut = [...document.querySelectorAll(".wide")].filter(box => box.scrollWidth > box.clientWidth).length;
const right = Math.max(...[...document.querySelectorAll("body *")].map(one => one.getBoundingClientRect().right));
document.body.dataset.found = JSON.stringify([orders, cut, right]);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser_nothing_is_wider_than_the_window_and_heads_sort(width: int, tmp_path: Path) -> None:
    long = "model.language_model.layers.{}.block_sparse_moe.experts.gate_up_projection"
    modules = [module(long.format(n), 10.0**-n, 1.0, output_power=[1.0, 1e-3, 1e-1][n]) for n in range(3)]
    modules[1] = dataclasses.replace(modules[1], bits=8, deviations=("damped",))
    head = ModuleReport("head", "float", None, None, (20, 48), reason="the output embedding")
    floats = [FloatWeight("model.language_model.embed_tokens.weight", (9, 9), 9, "embeddings")] * 9
    whole = report(*modules, head, metrics={"validation/loss_of_all": {"float": 2.0, "gptq": 2.1}})
    whole.coverage, whole.size = Coverage(floats, 900, 300), ExportSize(500, 81)
    file = tmp_path / "report.html"
    file.write_text(report_page(whole, "model").replace("</body>", f"{SORTED}</body>"), encoding="utf-8")
    probe = "onload = () => document.body.append('{', frames[0].document.body.dataset.found, '}')"
    frame = tmp_path / "frame.html"  # a headless window may be wider than asked for
    frame.write_text(f"<iframe src='report.html' width={width} height=3000></iframe><script>{probe}</script>")
    options = ("--headless", "--no-sandbox", "--allow-file-access-from-files", "--virtual-time-budget=2000")
    command = [str(CHROMIUM), *options, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    orders, cut, right = json.loads(done.stdout.rpartition("{")[2].partition("}")[0])
    a, b, c = (one.name for one in modules)
    assert orders == [
        [b, a, c, "head"],  # 100, 1 and 0.1 times the output
        ["head", a, b, c],
        [a, b, c, "head"],
        [a, b, c, "head"],
    ]
    assert cut == 0 and right <= width
