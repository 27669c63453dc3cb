"""The end of a run in a few lines: what became of the layers, the metrics and the export."""

from __future__ import annotations

import math
from pathlib import Path

from reports import module, report

from gptq_plugin.report.coverage import Coverage, FloatWeight
from gptq_plugin.report.ending import ending, exported, layers_shown
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.report import ExportSize, QuantizeReport

HEAD = ModuleReport("head", "float", None, None, (20, 48), reason="the output embedding")


def finished() -> QuantizeReport:
    whole = report(
        module("layers.0.up", 0.02, 0.05, stored_bytes=400, output_power=1.0, deviations=("damped",)),
        module("layers.1.up", 0.03, 0.05, stored_bytes=400, output_power=0.5, deviations=("damped",)),
        HEAD,
        metrics={"val_loss": {"float": 2.5, "gptq": 2.55}, "acc": {"gptq": math.nan, "float": 0.0}},
        seconds={"total": 3.21},
        size=ExportSize(bytes=2_100_000, float_bytes=1200),
    )
    whole.coverage = Coverage([FloatWeight("head.weight", (20, 48), 1200, "the output embedding")], 8_000_000, 800)
    return whole


def test_it_names_layers_metrics_the_worst_layer_the_export_its_size_and_the_page() -> None:
    assert ending(finished(), Path("runs/out")).splitlines() == [
        "GPTQ: 2 layers are 3-bit now, 1 stay float; 3.33 bits per weight; loss 0.5 of round-to-nearest's; 40 samples, "
        "640 tokens; 3.2 s",
        "val_loss: 2.5 float, 2.55 quantized (+0.05, +2.00 %)",
        "acc: 0 float, unknown quantized",
        "largest relative error: 6 %, layers.1.up",
        "differs from the request in 1 point: see the warnings, or the report",
        "exported to runs/out: 2.1 MB instead of 8 MB, 60.0% of it float",
        "every layer: runs/out/report.html",
    ]


def test_an_export_by_itself_is_two_lines() -> None:
    whole = finished()
    assert exported(whole, Path("out")).splitlines() == [
        "exported to out: 2.1 MB instead of 8 MB, 60.0% of it float",
        "every layer: out/report.html",
    ]
    whole.coverage, whole.modules = None, [module("a", stored_bytes=400)]
    assert exported(whole, Path("out")) == "exported to out: 2.1 MB, 75.0% of it float\nevery layer: out/report.html"


def test_without_an_export_none_is_told() -> None:
    (line,) = ending(report(module("a", stored_bytes=400)), None).splitlines()
    assert line.startswith("GPTQ: 1 layers are 3-bit now")


def test_differences_are_counted_as_the_log_has_them() -> None:
    several = report(module("a", deviations=("damped",)), module("b", deviations=("damped",)), deviations=["x", "y"])
    assert ending(several, None).splitlines()[-1].startswith("differs from the request in 3 points: ")


def test_a_large_model_is_shown_by_kinds_and_a_small_one_by_layers() -> None:
    small, large = ([module(f"layers.{n}.up") for n in range(count)] for count in (64, 65))
    assert len(layers_shown(report(*small)).splitlines()) == 65
    assert layers_shown(report(*large)).splitlines()[1].split()[:2] == ["layers.*.up", "65"]
