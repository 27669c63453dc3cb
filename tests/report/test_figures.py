"""The figures that the page and the model card share."""

from __future__ import annotations

import math

from reports import module, report

from gptq_plugin.report.figures import MetricValue, bit_widths, bits_label, metric_values
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.spread import Spread


def test_every_value_of_a_metric_follows_the_float_models_with_its_change() -> None:
    metrics = {"loss": {"rtn": 3.0, "float": 2.0, "gptq": 1.5}, "debt": {"float": -4.0, "gptq": -3.0, "mine": -4.0}}
    float_loss, rtn, gptq, float_debt, gptq_debt, mine = metric_values(report(metrics=metrics))
    assert rtn == MetricValue("loss", "round-to-nearest", 3.0, 1.0, 0.5)
    assert gptq == MetricValue("loss", "GPTQ", 1.5, -0.5, -0.25)
    assert gptq_debt == MetricValue("debt", "GPTQ", -3.0, 1.0, 0.25)  # relative to the float value's size
    assert mine == MetricValue("debt", "mine", -4.0, 0.0, 0.0)
    for one, metric, value in ((float_loss, "loss", 2.0), (float_debt, "debt", -4.0)):
        assert (one.metric, one.model, one.value) == (metric, "float", value)
        assert math.isnan(one.change) and math.isnan(one.relative)


def test_a_change_is_unknown_without_a_float_value_and_has_no_share_of_zero() -> None:
    (gptq,) = metric_values(report(metrics={"loss": {"gptq": 1.5}}))
    assert gptq.value == 1.5 and math.isnan(gptq.change) and math.isnan(gptq.relative)
    _, gptq = metric_values(report(metrics={"loss": {"float": 0.0, "gptq": 1.5}}))
    assert gptq.change == 1.5 and math.isnan(gptq.relative)


def test_a_change_is_shown_with_what_it_is_known_to() -> None:
    metrics = {"loss": {"float": 2.0, "rtn": 3.0, "gptq": 2.006}}
    whole = report(metrics=metrics, spreads={"loss": Spread(0.004, 0.008, 0.002, 0.004, 40)})
    _, gptq, rtn = sorted(metric_values(whole), key=lambda value: value.value)
    assert (gptq.margin, gptq.relative_margin) == (0.002, 0.001) and math.isnan(rtn.margin)
    assert gptq.shown == ("+0.006 ± 0.002", "+0.30 ± 0.10 %") and rtn.shown == ("+1", "+50.00 %")
    whole.spreads = {"loss": Spread(0.004, 0.008, math.nan, math.nan, 40)}
    assert list(metric_values(whole))[1].shown in {("+0.006 ± 0.002", "+0.30 %"), ("+1", "+50.00 %")}
    assert next(metric_values(whole)).shown == ("", "")


def test_the_bits_of_a_model_are_those_of_its_quantized_modules() -> None:
    modules = [ModuleReport(f"layers.{bits}", "gptq", bits, 16, (20, 48)) for bits in (8, 3, 4, 3)]
    head = ModuleReport("head", "float", None, None, (20, 48))
    assert bit_widths(report(*modules, head)) == [3, 4, 8] and bits_label(report(*modules, head)) == "3/4/8-bit"
    assert bits_label(report(module("a"), head)) == "3-bit"
    assert bit_widths(report(head)) == [] and bits_label(report(head)) == "float"
