"""What loggers get of a report."""

from __future__ import annotations

import math

import reports

from gptq_plugin.report.spread import Spread
from gptq_plugin.training.log_metrics import layer_metrics, layers_table, quality_metrics, total_metrics


def test_totals_are_named_and_finite():
    made = reports.report(reports.module("a", loss=0.5), reports.module("b", loss=0.25))
    metrics = total_metrics(made)
    assert metrics == {f"gptq/{key}": value for key, value in made.totals().items()}
    assert metrics["gptq/loss"] == 0.75 and metrics["gptq/modules"] == 2
    made = reports.report(reports.module("a", loss=math.inf))
    assert "gptq/loss" not in total_metrics(made) and total_metrics(made)["gptq/rtn_loss"] == 0.05


def test_every_quantized_layer_has_its_numbers_as_far_as_they_are_known():
    made = reports.report(reports.module("a.b"), reports.module("c", loss=math.nan))
    metrics = layer_metrics(made)
    expected = {"loss": 0.02, "rtn_loss": 0.05, "damp_percent": 0.01, "tokens": 640.0, "seconds": 0.25}
    assert {f"gptq/a.b/{key}": value for key, value in expected.items()}.items() <= metrics.items()
    assert "gptq/c/loss" not in metrics and metrics["gptq/c/rtn_loss"] == 0.05 and len(metrics) == 9


def test_metrics_before_and_after_come_with_their_difference():
    made = reports.report(reports.module("a"))
    assert quality_metrics(made) == {}
    made.metrics = {"val_loss": {"float": 1.0, "gptq": 1.25}, "val_acc": {"float": 0.5, "gptq": 0.25}}
    assert quality_metrics(made) == {
        "gptq/val_loss/float": 1.0, "gptq/val_loss/gptq": 1.25, "gptq/val_loss/difference": 0.25,
        "gptq/val_acc/float": 0.5, "gptq/val_acc/gptq": 0.25, "gptq/val_acc/difference": -0.25,
    }  # fmt: skip


def test_a_difference_that_is_known_to_so_much_tells_it():
    made = reports.report(
        metrics={"val_loss": {"float": 1.0, "gptq": 1.25}}, spreads={"val_loss": Spread(0, 1, 0, 1, 9)}
    )
    assert quality_metrics(made)["gptq/val_loss/margin"] == 0.5


def test_the_table_has_a_row_for_each_layer_and_nothing_where_a_number_is_unknown():
    made = reports.report(reports.module("a|b"), reports.module("c", loss=math.inf))
    table = layers_table(made)
    assert table.by_column()["name"] == ["a|b", "c"] and table.by_column()["loss"] == [0.02, None]
    head, line, first, _ = table.markdown().split("\n")
    assert head.startswith("| name | method | bits |") and line.count("---") == len(table.columns)
    assert first.startswith("| a\\|b | gptq | ")
