"""quantization_report.json, written and read back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.report.base_card import License
from gptq_plugin.report.model_card import ModelFacts
from gptq_plugin.report.report import ExportSize
from gptq_plugin.report.spread import Spread
from gptq_plugin.report.stored_report import read_report, report_text

from cards import report_of
from models import tiny_llama

FACTS = ModelFacts(
    "Net", "AutoModelForCausalLM", torch.bfloat16, "a/b", "text-generation", "llama", License("mit"), True
)


def test_a_real_report_comes_back_as_it_was():
    options = {"group_size": 32, "dynamic": {".*down_proj": {"bits": 8}}, "clip_ratios": (1.0, 0.9)}
    report = QuantizeModule(**options).quantize(tiny_llama(), [{"input_ids": torch.arange(3, 30)[None]}] * 8)
    report.metrics, report.size = {"val_loss": {"float": 1.5, "gptq": math.nan}}, ExportSize(100, 60)
    report.spreads = {"val_loss": Spread(0.1, 0.2, 0.05, 0.1, 40)}
    assert any(module.method == "float" for module in report.modules) and report.coverage.floats and report.deviations
    text = report_text(report, FACTS)
    again, facts = read_report(text)
    assert facts == FACTS and report_text(again, facts) == text
    for field in dataclasses.fields(report):
        if field.name not in ("modules", "metrics"):  # these hold NaN, which is equal to nothing
            assert getattr(again, field.name) == getattr(report, field.name), field.name
    assert [repr(module) for module in again.modules] == [repr(module) for module in report.modules]
    assert math.isnan(again.metrics["val_loss"]["gptq"]) and again.metrics["val_loss"]["float"] == 1.5


def test_a_report_without_coverage_or_size_and_a_model_without_license_come_back():
    facts = ModelFacts("Net")
    again, same = read_report(report_text(report_of((4, 128), (3, -1)), facts))
    assert same == facts and again.coverage is again.size is None and [m.bits for m in again.modules] == [4, 3]
    assert again.config == QuantizeConfig()


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("model"),
        lambda values: values["modules"][0].pop("shape"),
        lambda values: values["config"].update(unheard_of=3),
        lambda values: values["config"].update(bits=5),
        lambda values: values.update(coverage={"share_float": 0.5}),
        lambda values: values["model"].update(dtype="nn"),
        lambda values: values.update(metrics=[]),
    ],
)
def test_a_report_of_another_version_is_refused(change):
    values = json.loads(report_text(report_of((4, 128)), FACTS))
    change(values)
    with pytest.raises(ValueError, match="no report of this version"):
        read_report(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match="no report of this version"):
        read_report(text)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("modules", 0, "reason"), 0.5), (("modules", 0, "loss"), "1"), (("modules", 0, "loss"), True),
        (("modules", 0, "shape"), [1]), (("modules", 0, "shape"), "ab"), (("modules", 0, "tokens"), 1.5),
        (("modules", 0, "deviations"), [3]), (("modules", 0), None), (("modules",), {"a": 1}), (("positions",), ["a"]),
        (("totals", "samples"), None), (("seconds",), {"total": "1"}), (("metrics",), {"a": {"b": []}}),
        (("model", "name"), 3), (("model", "dtype"), "nn"), (("model", "base_license"), {"id": 1}), (("run_id",), 7),
        (("coverage",), {"floats": [{}], "quantized_bytes": 1, "packed_bytes": 1}), (("deviations",), "text"),
        (("modules", 0, "loss"), 10**400), (("size",), {"float_bytes": "1", "tensor_bytes": 2}),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_makes_it_no_report(place, value):
    values = json.loads(report_text(report_of((4, 128)), FACTS))
    inside = values
    for key in place[:-1]:
        inside = inside[key]
    assert inside[place[-1]] is not Ellipsis  # there is such a field
    inside[place[-1]] = value
    with pytest.raises(ValueError, match="no report of this version"):
        read_report(json.dumps(values))


def test_figures_without_a_point_are_figures():
    values = json.loads(report_text(report_of((4, 128)), FACTS))
    values["modules"][0]["loss"] = 3
    assert read_report(json.dumps(values))[0].modules[0].loss == 3.0
