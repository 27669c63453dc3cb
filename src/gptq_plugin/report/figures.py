"""A report's figures as people read them, for the page and the model card."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptq_plugin.report.report import QuantizeReport

MODELS = {"float": "float", "gptq": "GPTQ", "rtn": "round-to-nearest"}  # the keys of `report.metrics`, spelled out


@dataclass(frozen=True)
class MetricValue:
    """One value of one metric.

    Attributes:
        metric: Its name, such as ``val_loss``.
        model: What was evaluated: a value of `MODELS`, or the report's own key.
        value: What the evaluation gave; may be NaN.
        change: From the float model; NaN for the float model itself and where there is none.
        relative: `format_change` as a part of the float value's size; NaN too where that is 0.
    """

    metric: str
    model: str
    value: float
    change: float = math.nan
    relative: float = math.nan


def metric_values(report: QuantizeReport) -> Iterator[MetricValue]:
    """Every value of `report.metrics`, a metric's float value first."""
    for metric, values in report.metrics.items():
        before = values.get("float", math.nan)
        for key in sorted(values, key=lambda key: key != "float"):
            change = values[key] - before if key != "float" else math.nan
            relative = change / abs(before) if before else math.nan
            yield MetricValue(metric, MODELS.get(key, key), values[key], change, relative)


def bit_widths(report: QuantizeReport) -> list[int]:
    """The bits of the quantized modules, each once, ascending."""
    return sorted({module.bits for module in report.quantized if module.bits is not None})


def bits_label(report: QuantizeReport) -> str:
    """The same in words, such as ``4-bit`` or ``3/4-bit``."""
    return f"{'/'.join(map(str, bit_widths(report)))}-bit" if bit_widths(report) else "float"
