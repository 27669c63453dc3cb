"""The figures that the page and the model card share."""

from __future__ import annotations

import math

from reports import module, report

from gptq_plugin.report.figures import Measured, bits_of, measured, widths
from gptq_plugin.report.report import ModuleReport


def test_every_value_of_a_metric_follows_the_float_models_with_its_change() -> None:
    metrics = {"loss": {"rtn": 3.0, "float": 2.0, "gptq": 1.5}, "debt": {"float": -4.0, "gptq": -3.0, "mine": -4.0}}
    float_loss, rtn, gptq, float_debt, gptq_debt, mine = measured(report(metrics=metrics))
    assert rtn == Measured("loss", "round-to-nearest", 3.0, 1.0, 0.5)
    assert gptq == Measured("loss", "GPTQ", 1.5, -0.5, -0.25)
    assert gptq_debt == Measured("debt", "GPTQ", -3.0, 1.0, 0.25)  # relative to the float value's size
    assert mine == Measured("debt", "mine", -4.0, 0.0, 0.0)
    for one, metric, value in ((float_loss, "loss", 2.0), (float_debt, "debt", -4.0)):
        assert (one.metric, one.model, one.value) == (metric, "float", value)
        assert math.isnan(one.change) and math.isnan(one.relative)


def test_a_change_is_unknown_without_a_float_value_and_has_no_share_of_zero() -> None:
    (gptq,) = measured(report(metrics={"loss": {"gptq": 1.5}}))
    assert gptq.value == 1.5 and math.isnan(gptq.change) and math.isnan(gptq.relative)
    _, gptq = measured(report(metrics={"loss": {"float": 0.0, "gptq": 1.5}}))
    assert gptq.change == 1.5 and math.isnan(gptq.relative)


def test_the_bits_of_a_model_are_those_of_its_quantized_modules() -> None:
    modules = [ModuleReport(f"layers.{bits}", "gptq", bits, 16, (20, 48)) for bits in (8, 3, 4, 3)]
    head = ModuleReport("head", "float", None, None, (20, 48))
    assert widths(report(*modules, head)) == [3, 4, 8] and bits_of(report(*modules, head)) == "3/4/8-bit"
    assert bits_of(report(module("a"), head)) == "3-bit"
    assert widths(report(head)) == [] and bits_of(report(head)) == "float"
