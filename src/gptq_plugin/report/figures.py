"""Figures of a report that the page and the model card share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptq_plugin.report.numbers import format_change, format_percent
from gptq_plugin.report.report import QuantizeReport

MODELS = {"float": "float", "gptq": "GPTQ", "rtn": "round-to-nearest"}  # names of `report.metrics`' keys


@dataclass(frozen=True)
class MetricValue:
    """One value of one metric.

    Attributes:
        metric: Its name, such as ``val_loss``.
        model: The evaluated model: a value of `MODELS`, or the report's key.
        value: The evaluation's result; may be NaN.
        change: Difference from the float model's value; NaN for that model itself, and without one.
        relative: `change` as a fraction of the float value's size; NaN if that is 0.
        margin, relative_margin: Both are known to so much (`Spread`); NaN if that is unknown.
    """

    metric: str
    model: str
    value: float
    change: float = math.nan
    relative: float = math.nan
    margin: float = math.nan
    relative_margin: float = math.nan

    @property
    def shown(self) -> tuple[str, str]:
        """The change and the relative change for people, each with its margin; blank if unknown."""
        change, relative = format_change(self.change), format_percent(self.relative)
        if change and not math.isnan(self.margin):
            change = f"{change} ± {self.margin:.2g}"
        if relative and not math.isnan(self.relative_margin):
            relative = f"{relative.removesuffix(' %')} ± {format_percent(self.relative_margin).removeprefix('+')}"
        return change, relative


def metric_values(report: QuantizeReport) -> Iterator[MetricValue]:
    """Yields the values of `report.metrics`, each metric's float value first."""
    for metric, values in report.metrics.items():
        before = values.get("float", math.nan)
        for key in sorted(values, key=lambda key: key != "float"):
            change = values[key] - before if key != "float" else math.nan
            relative = change / abs(before) if before else math.nan
            spread = report.spreads.get(metric) if key == "gptq" else None
            margins = (math.nan, math.nan) if spread is None else (spread.margin, spread.relative_margin)
            yield MetricValue(metric, MODELS.get(key, key), values[key], change, relative, *margins)


def spread_notes(report: QuantizeReport) -> list[str]:
    """What the metrics' margins are, a sentence for each way in which they were found."""
    over: dict[str, list[str]] = {}
    for metric, spread in report.spreads.items():
        over.setdefault(spread.over, []).append(metric)
    return [
        f"±: the 95 % interval of a paired bootstrap over {drawn}"
        + (f" ({', '.join(names)})." if len(over) > 1 else ".")
        for drawn, names in over.items()
    ]


def bit_widths(report: QuantizeReport) -> list[int]:
    """Distinct bits of the quantized modules, ascending."""
    return sorted({module.bits for module in report.quantized if module.bits is not None})


def bits_label(report: QuantizeReport) -> str:
    """`bit_widths` in words, such as ``4-bit`` or ``3/4-bit``."""
    return f"{'/'.join(map(str, bit_widths(report)))}-bit" if bit_widths(report) else "float"
