"""Metadata of a model card: the hub's keys, and results that its library reads back."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub import ModelCard
from reports import module, report

from gptq_plugin.report.base_card import License
from gptq_plugin.report.card_metadata import metadata
from gptq_plugin.report.report import QuantizeReport


def made(whole: QuantizeReport, **changed: Any) -> dict[str, Any]:
    given = {"base_model": None, "base_license": None, "library": "transformers", "pipeline_tag": None}
    return metadata(whole, "a model", **{**given, **changed})


def test_what_is_unknown_is_left_out() -> None:
    assert made(report(module("a"))) == {
        "library_name": "transformers",
        "tags": ["gptq", "3-bit", "quantized", "gptq_plugin"],
    }


def test_the_license_comes_first_and_the_base_after_it() -> None:
    keys = list(made(report(module("a")), base_model="org/m", base_license=License("other", "theirs")))
    assert keys[:4] == ["license", "license_name", "base_model", "base_model_relation"]


def test_several_metrics_are_results_of_one_evaluation_that_read_back() -> None:
    metrics = {"val_loss": {"float": 2.0, "gptq": 2.5, "rtn": 3.0}, "val\nacc": {"float": 0.5, "gptq": 0.25}}
    data = made(report(module("a"), metrics=metrics), pipeline_tag="text-classification")
    (index,) = data["model-index"]
    assert index["name"] == "a model" and len(index["results"]) == 1
    card = ModelCard(f"---\n{yaml.safe_dump(data)}---\n")
    found = {(one.task_type, one.metric_type, one.metric_name, one.metric_value) for one in card.data.eval_results}
    assert found == {
        ("text-classification", "loss", "val_loss", 2.5),
        ("text-classification", "accuracy", "val acc", 0.25),
    }
