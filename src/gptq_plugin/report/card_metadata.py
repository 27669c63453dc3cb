"""The YAML metadata of a model card, as the hub reads it: `metadata`."""

from __future__ import annotations

import math
import re
from typing import Any

from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.report.base_card import License
from gptq_plugin.report.figures import MODELS, bit_widths, metric_values
from gptq_plugin.report.report import QuantizeReport

# The hub's metrics (https://huggingface.co/metrics) that a logged name may stand for, by a part of it.
_METRICS = {"perplexity": "perplexity", "ppl": "perplexity", "loss": "loss", "acc": "accuracy", "f1": "f1",
            "bleu": "bleu", "rouge": "rouge", "wer": "wer", "cer": "cer", "mse": "mse", "mae": "mae"}  # fmt: skip


def metadata(
    report: QuantizeReport,
    title: str,
    *,
    base_model: str | None,
    base_license: License | None,
    library: str,
    pipeline_tag: str | None,
) -> dict[str, Any]:
    """The hub's keys; unknown values are left out.

    Args:
        report: The quantization's.
        title: The model's name in its results.
        base_model: Id on the hub of the model it was trained from.
        base_license: Of that model.
        library: The library that loads the export.
        pipeline_tag: The hub's name of its task.
    """
    base = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    task = {"pipeline_tag": pipeline_tag} if pipeline_tag else {}
    metrics = {"metrics": [" ".join(metric.split()) for metric in report.metrics]} if report.metrics else {}
    return {
        **(base_license.metadata() if base_license else {}),
        **base,
        "library_name": library,
        **task,
        "tags": ["gptq", *(f"{bits}-bit" for bits in bit_widths(report)), "quantized", QUANTIZER_NAME],
        **metrics,
        **_model_index(report, title, pipeline_tag or "other"),
    }


def _model_index(report: QuantizeReport, title: str, task: str) -> dict[str, Any]:
    """The quantized model's results: of benchmarks, and on the run's validation data, whose name on the hub, if any, is
    not known."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    results = []
    for value in metric_values(report):
        if value.model != MODELS["gptq"] or not math.isfinite(value.value):
            continue
        benchmark = report.benchmarks.get(value.metric)
        name = value.metric if benchmark is None else benchmark.metric
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=(benchmark and benchmark.dataset) or "unknown",
                dataset_name="validation data of the training run" if benchmark is None else benchmark.task,
                metric_type=_metric_type(name),
                metric_name=" ".join(name.split()),
                metric_value=value.value,
            )
        )
    return {"model-index": eval_results_to_model_index(title, results)} if results else {}


def _metric_type(name: str) -> str:
    parts = re.split(r"[^a-z0-9]+", name.lower())
    known = (kind for part, kind in _METRICS.items() if any(word.startswith(part) for word in parts))
    return next(known, "_".join(filter(None, parts)) or "unknown")
