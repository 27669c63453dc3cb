"""Metrics of a report under the names loggers get: ``gptq/...``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptq_plugin.report.report import QuantizeReport

_LAYER = ("loss", "rtn_loss", "damp_percent", "tokens", "seconds")


def total_metrics(report: QuantizeReport) -> dict[str, float]:
    """Totals of the whole model, as far as they are finite: ``gptq/loss``, ``gptq/modules``, ..."""
    return _finite({f"gptq/{key}": value for key, value in report.totals().items()})


def layer_metrics(report: QuantizeReport) -> dict[str, float]:
    """Numbers of each quantized layer, as far as they are finite: ``gptq/LAYER/loss``, ``gptq/LAYER/seconds``, ..."""
    return _finite({f"gptq/{m.name}/{key}": float(getattr(m, key)) for m in report.quantized for key in _LAYER})


def quality_metrics(report: QuantizeReport) -> dict[str, float]:
    """Validation metrics before and after: ``gptq/METRIC/float``, ``gptq/METRIC/gptq``, ``gptq/METRIC/difference``; and
    ``gptq/METRIC/margin``, to which the difference is known (`Spread`), where it is."""
    metrics: dict[str, float] = {}
    for name, values in report.metrics.items():
        metrics |= {f"gptq/{name}/{model}": value for model, value in values.items()}
        metrics[f"gptq/{name}/difference"] = values["gptq"] - values["float"]
    metrics |= {f"gptq/{name}/margin": spread.margin for name, spread in report.spreads.items()}
    return metrics


def finish_metrics(report: QuantizeReport) -> list[tuple[int, dict[str, float]]]:
    """The judgements of a finish, each with its number of steps: ``gptq/finish/kl`` of the held-out samples, and
    ``gptq/finish/train_kl``."""
    curve = () if report.finish is None else report.finish.curve
    return [
        (one.step, _finite({"gptq/finish/kl": one.held_out, "gptq/finish/train_kl": one.training})) for one in curve
    ]


@dataclass(frozen=True)
class Table:
    """A table as trackers take it. Values are texts, numbers or None, which is unknown."""

    columns: list[str]
    rows: list[list[Any]]

    def by_column(self) -> dict[str, list[Any]]:
        """The values of each column."""
        return {name: [row[place] for row in self.rows] for place, name in enumerate(self.columns)}

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_shown(value) for value in line) + " |" for line in lines)


_COLUMNS = ("name", "method", "bits", "group_size", "out", "in", "relative_error", "loss", "rtn_loss", "damp_percent",
            "tokens", "seconds", "reason")  # fmt: skip


def layers_table(report: QuantizeReport) -> Table:
    """Every linear layer, in the model's order; see `ModuleReport`."""
    rows = []
    for module in report.modules:
        values = {"out": module.shape[0], "in": module.shape[1]}
        row = [values[name] if name in values else getattr(module, name) for name in _COLUMNS]
        rows.append([None if isinstance(value, float) and not math.isfinite(value) else value for value in row])
    return Table(list(_COLUMNS), rows)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
