"""Metrics of a report under the names loggers get: ``gptq/...``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gptq_plugin.report.report import QuantizeReport

_LAYER = ("loss", "rtn_loss", "damp_percent", "tokens", "seconds")


def total_metrics(report: QuantizeReport) -> dict[str, float]:
    """Totals of the whole model, as far as they are finite: ``gptq/loss``, ``gptq/modules``, ..."""
    return _finite({f"gptq/{key}": value for key, value in report.totals().items()})


def layer_metrics(report: QuantizeReport) -> dict[str, float]:
    """Numbers of each quantized layer, as far as they are finite: ``gptq/LAYER/loss``, ``gptq/LAYER/seconds``, ..."""
    return _finite({f"gptq/{m.name}/{key}": float(getattr(m, key)) for m in report.quantized for key in _LAYER})


def quality_metrics(report: QuantizeReport) -> dict[str, float]:
    """Validation metrics before and after: ``gptq/METRIC/float``, ``gptq/METRIC/gptq``, ``gptq/METRIC/difference``."""
    metrics: dict[str, float] = {}
    for name, values in report.metrics.items():
        metrics |= {f"gptq/{name}/{model}": value for model, value in values.items()}
        metrics[f"gptq/{name}/difference"] = values["gptq"] - values["float"]
    return metrics


def finish_metrics(report: QuantizeReport) -> list[tuple[int, dict[str, float]]]:
    """The judgements of a finish, each with its number of steps: ``gptq/finish/kl`` of the held-out samples, and
    ``gptq/finish/train_kl``."""
    curve = () if report.finish is None else report.finish.curve
    return [
        (one.step, _finite({"gptq/finish/kl": one.held_out, "gptq/finish/train_kl": one.training})) for one in curve
    ]


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
