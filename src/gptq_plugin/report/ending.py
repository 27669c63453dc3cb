"""What users see at the end of a run: `ending`, a few lines, and `layers_shown`, the table of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from gptq_plugin.report.cache import cache_summary
from gptq_plugin.report.figures import bits_label, metric_values, spread_notes
from gptq_plugin.report.numbers import format_bytes, format_share, format_value
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.report.table import kind_table, layer_table

PAGE = "report.html"
_MOST_LAYERS = 64  # in a terminal; of more, a line for each kind


def ending(report: QuantizeReport, folder: Path | None) -> str:
    """The result in a few lines: layers, metrics before and after, the worst layer, the export and its size.

    Args:
        report: The run's.
        folder: Its export; None without one.
    """
    export = _export(report, folder) if folder is not None else ()
    parts = (_metrics(report), _worst(report), _finish(report), _taken(report), _differences(report), export)
    return "\n".join([_layers(report), *(line for part in parts for line in part)])


def exported(report: QuantizeReport, folder: Path) -> str:
    """The export and its size, for an export by itself."""
    return "\n".join(_export(report, folder))


def layers_shown(report: QuantizeReport) -> str:
    """The table of layers; for large models a line for each kind of layer."""
    if len(report.modules) <= _MOST_LAYERS:
        return "\n".join(layer_table(report.modules, narrow=True))
    return "\n".join(kind_table(report.modules))


def _layers(report: QuantizeReport) -> str:
    totals = report.totals()
    parts = [
        f"GPTQ: {totals['modules']} layers are {bits_label(report)} now, {totals['modules_float']} stay float",
        f"{report.bits_per_weight:.2f} bits per weight",
    ]
    if totals["rtn_loss"]:
        parts.append(f"loss {format_value(totals['loss'] / totals['rtn_loss'], 3)} of round-to-nearest's")
    if report.samples:
        parts.append(f"{report.samples} samples, {report.tokens} tokens")
    return "; ".join([*parts, f"{totals['seconds']:.1f} s"])


def _metrics(report: QuantizeReport) -> Iterator[str]:
    for value in metric_values(report):
        if value.model == "GPTQ":
            before = report.metrics[value.metric].get("float", math.nan)
            change = ", ".join(filter(None, value.shown))
            yield (
                f"{value.metric}: {format_value(before, 5) or 'unknown'} float, "
                f"{format_value(value.value, 5) or 'unknown'} quantized" + (f" ({change})" if change else "")
            )
    yield from spread_notes(report)


def _worst(report: QuantizeReport) -> Iterator[str]:
    known = [module for module in report.quantized if not math.isnan(module.relative_error)]
    if len(known) > 1:
        worst = max(known, key=lambda module: module.relative_error)
        yield f"largest relative error: {format_share(worst.relative_error)}, {worst.name}"


def _taken(report: QuantizeReport) -> Iterator[str]:
    summary = cache_summary(report.cache)
    if summary is not None:
        yield summary


def _finish(report: QuantizeReport) -> Iterator[str]:
    if report.finish is not None:
        yield report.finish.summary()


def _differences(report: QuantizeReport) -> Iterator[str]:
    count = len(report.deviation_lines())
    if count:
        points = "1 point" if count == 1 else f"{count} points"
        yield f"differs from the request in {points}: see the warnings, or the report"


def _export(report: QuantizeReport, folder: Path) -> Iterator[str]:
    size = ""
    if report.size is not None:
        size = f": {format_bytes(report.size.bytes)}"
        if report.coverage is not None:
            size += f" instead of {format_bytes(report.coverage.float_model)}"
        size += f", {report.float_share:.1%} of it float"
    yield f"exported to {folder}{size}"
    yield f"every layer: {folder / PAGE}"
