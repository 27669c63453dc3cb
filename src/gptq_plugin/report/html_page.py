"""report.html: a `QuantizeReport` as one self-contained page, without network; its script only sorts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from gptq_plugin.errors import some
from gptq_plugin.report.cache import cache_summary
from gptq_plugin.report.chart import error_chart
from gptq_plugin.report.figures import bits_label, metric_values, spread_notes
from gptq_plugin.report.layer_rows import layers_table
from gptq_plugin.report.numbers import (
    format_bits_per_weight,
    format_bytes,
    format_value,
)
from gptq_plugin.report.page_assets import SCRIPT, STYLE
from gptq_plugin.report.report import QuantizeReport


def report_page(report: QuantizeReport, title: str) -> str:
    """A complete HTML document: figures, sizes, metrics, the chart of errors, all modules, times, deviations.

    All texts of the report are escaped. Unknown figures (NaN) are blank.

    Args:
        report: The report to show.
        title: The heading, such as the model's name.
    """
    sections = [
        f"<h1>{escape(title)}</h1>",
        _origin(report),
        _tiles(report),
        _deviations(report),
        _size(report),
        _metrics(report),
        "<h2>Error by module</h2>",
        error_chart(report.quantized),
        "<h2>Modules</h2>",
        layers_table(report.modules, report.grouped_deviations()),
        _allocation(report),
        _finish(report),
        _floats(report),
        _seconds(report.seconds),
        _cache(report),
        _config(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def _origin(report: QuantizeReport) -> str:
    calibrated = "Rounded to nearest, without calibration."
    if report.tokens:
        source = f" on {escape(report.calibration)}" if report.calibration else ""
        calibrated = f"Calibrated{source}: {report.samples:,} samples, {report.tokens:,} tokens."
    digest = f" Their SHA-256 begins with {report.calibration_sha256[:12]}." if report.calibration_sha256 else ""
    return f"<p class='soft'>Report of a GPTQ quantization. {calibrated}{digest}</p>"


def _tiles(report: QuantizeReport) -> str:
    totals = report.totals()
    ratio = totals["loss"] / totals["rtn_loss"] if totals["rtn_loss"] else math.nan
    tiles = [
        *_before_after(report),
        (f"{totals['modules']:,}", f"modules quantized, {totals['modules_float']:,} left float"),
        (bits_label(report), format_bits_per_weight(report.bits_per_weight) if report.weights else "nothing"),
        *_sizes(report),
        (format_value(ratio, 3), "of round-to-nearest's loss"),
        (f"{report.samples:,}", f"calibration samples, {report.tokens:,} tokens"),
        (f"{totals['seconds']:.1f} s", "total"),
    ]
    shown = [f"<div><b>{escape(figure)}</b><span>{escape(what)}</span></div>" for figure, what in tiles if figure]
    return f"<div class='tiles'>{''.join(shown)}</div>"


def _sizes(report: QuantizeReport) -> Iterator[tuple[str, str]]:
    if report.size is not None:
        before = f", {format_bytes(report.coverage.float_model)} before" if report.coverage is not None else ""
        yield format_bytes(report.size.bytes), f"the whole export{before}"
    if not math.isnan(report.float_share):
        yield f"{report.float_share:.1%}", "of the weights' bytes in the export stay float"
    yield format_bytes(report.stored_bytes), f"quantized weights; {format_bytes(2 * report.weights)} in 16 bits"


def _size(report: QuantizeReport) -> str:
    """A bar of the export's bytes, quantized, float and other."""
    if report.size is None:
        return ""
    rest = max(0, report.size.bytes - report.stored_bytes - report.size.float_bytes)
    parts = [
        ("packed", report.stored_bytes, "codes, scales and zeros"),
        ("floats", report.size.float_bytes, "float"),
        ("rest", rest, "group indices (g_idx) and headers of files"),
    ]
    bar = "".join(f"<i class='{kind}' style='flex:{size} 0 0'></i>" for kind, size, _ in parts if size)
    legend = "".join(f"<span><i class='{kind}'></i>{format_bytes(size)} {what}</span>" for kind, size, what in parts)
    return (
        f"<h2>Size of the export: {format_bytes(report.size.bytes)}</h2>"
        f"<div class='split'>{bar}</div><div class='legend'>{legend}</div>"
    )


def _floats(report: QuantizeReport) -> str:
    """What stays float, by reason."""
    if report.coverage is None or not report.coverage.floats:
        return ""
    whole = max(1, report.coverage.float_model)
    rows = [
        _cells([reason, format_bytes(size), f"{size / whole:.1%}", some(one.name for one in ones)])
        for reason, size, ones in report.coverage.by_reason()
    ]
    head = ("reason", "size", "of the model", "parameters")
    return f"<h2>What stays float</h2><div class='wide free'>{_table(head, rows, text=(0, 3))}</div>"


def _allocation(report: QuantizeReport) -> str:
    """What `target_bits` chose, and why."""
    if report.allocation is None:
        return ""
    return _section("Bits at a budget", report.allocation.summary(), report.allocation.rows())


def _cache(report: QuantizeReport) -> str:
    summary = cache_summary(report.cache)
    return "" if summary is None else f"<p>{escape(summary)}</p>"


def _finish(report: QuantizeReport) -> str:
    """What training towards the float model gave, and why that is kept or not."""
    if report.finish is None:
        return ""
    return _section("Finish", report.finish.summary(), report.finish.rows())


def _section(title: str, summary: str, table: Iterable[Sequence[str]]) -> str:
    """A sentence and its table, whose first row is the head."""
    head, *rows = table
    made = _table(head, map(_cells, rows))
    return f"<h2>{title}</h2><p>{escape(summary)}</p><div class='wide free'>{made}</div>"


def _before_after(report: QuantizeReport) -> Iterator[tuple[str, str]]:
    for metric, values in report.metrics.items():
        before, after = (format_value(values.get(key, math.nan), 5) for key in ("float", "gptq"))
        if before and after:
            yield f"{before} → {after}", f"{metric}, float → GPTQ"


def _deviations(report: QuantizeReport) -> str:
    lines = report.deviation_lines()
    if not lines:
        return "<p>No differences from the request.</p>"
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f"<section class='deviations'><h2>Differences from the request ({len(lines)})</h2><ol>{listed}</ol></section>"
    )


def _metrics(report: QuantizeReport) -> str:
    rows = [(m.metric, m.model, format_value(m.value, 5), *m.shown) for m in metric_values(report)]
    if not rows:
        return ""
    head = ("metric", "model", "value", "change", "relative")
    notes = "".join(f"<p>{escape(note)}</p>" for note in spread_notes(report))
    return (
        f"<h2>Before and after</h2><div class='wide free'>{_table(head, map(_cells, rows), text=(0, 1))}</div>{notes}"
    )


def _seconds(seconds: dict[str, float]) -> str:
    phases = {phase: spent for phase, spent in seconds.items() if phase != "total"}
    if not phases:
        return ""
    longest = max(phases.values()) or 1.0
    rows = [
        [
            *_cells([phase, f"{spent:.2f}"]),
            f"<td><span class='bar' style='width:{100 * max(spent, 0) / longest:.1f}%'></span></td>",
        ]
        for phase, spent in phases.items()
    ]
    if "total" in seconds:
        rows.append([*_cells(["total", f"{seconds['total']:.2f}"]), "<td></td>"])
    return f"<h2>Seconds</h2><div class='wide free bars'>{_table(('phase', 'seconds', ''), rows)}</div>"


def _config(report: QuantizeReport) -> str:
    rows = [_cells([name, str(setting)]) for name, setting in report.config.to_dict().items()]
    return (
        "<h2>Configuration</h2><details><summary>All options</summary>"
        f"<div class='wide free'>{_table(('option', 'value'), rows, text=(0, 1))}</div></details>"
    )


def _cells(texts: Iterable[str]) -> list[str]:
    return [f"<td>{escape(text)}</td>" for text in texts]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """A table of ``<td>`` cells; the columns in `text` hold words, the others figures."""
    lines = [
        "".join(cell.replace("<td>", "<td class='left'>", 1) if n in text else cell for n, cell in enumerate(cells))
        for cells in rows
    ]
    titles = [f"<th{' class=left' if n in text else ''}>{escape(name)}</th>" for n, name in enumerate(head)]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{''.join(titles)}</tr></thead><tbody>{body}</tbody></table>"
