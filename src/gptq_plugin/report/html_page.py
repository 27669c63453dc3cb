"""report.html: a `QuantizeReport` as one self-contained page, without network or JavaScript."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from gptq_plugin.report.chart import loss_chart
from gptq_plugin.report.figures import bits_label, metric_values
from gptq_plugin.report.numbers import format_bits_per_weight, format_bytes, format_change, format_percent, format_value
from gptq_plugin.report.report import ModuleReport, QuantizeReport

# Blue and orange of Okabe and Ito's palette, distinct in any colour vision; round-to-nearest's mark is also hollow.
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #5d6670; --rule: #d8dde3; --box: #f4f6f8;
  --gptq: #0072b2; --rtn: #c25a00; --warn: #fff4e0; --warn-rule: #c25a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --soft: #9aa4af; --rule: #343b44;
  --box: #1d2229; --gptq: #56b4e9; --rtn: #e69f00; --warn: #2c2413; --warn-rule: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
p { margin: .25rem 0; }
.soft { color: var(--soft); fill: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tiles div { background: var(--box); border-radius: 6px; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.15rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
.deviations { background: var(--warn); border-left: 4px solid var(--warn-rule); border-radius: 4px; margin: 1.25rem 0;
  padding: .75rem 1rem; }
.deviations h2 { margin: 0 0 .25rem; }
.deviations ul { margin: 0; padding-left: 1.2rem; max-height: 22rem; overflow: auto; }
figure { margin: 0; }
figcaption { margin-bottom: .75rem; }
.legend { margin-top: .25rem; }
.legend span { margin-right: 1.25rem; white-space: nowrap; }
.legend svg { vertical-align: -1px; }
.chart { display: block; overflow: visible; }
.gptq { fill: var(--gptq); stroke: var(--gptq); }
.rtn { fill: var(--paper); stroke: var(--rtn); stroke-width: 1.5; }
.link { stroke: var(--soft); opacity: .45; }
.grid { stroke: var(--rule); }
.hit { fill: transparent; }
g:hover .hit { fill: var(--box); }
.kind { fill: var(--ink); font-size: 12px; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.axis { fill: var(--soft); font-size: 11px; text-anchor: middle; }
.wide { overflow: auto; max-height: 44rem; border: 1px solid var(--rule); border-radius: 6px; overflow-wrap: normal; }
.wide.free { max-height: none; border: 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; background: var(--paper); }
thead th { position: sticky; top: 0; }
.left { text-align: left; }
td.remarks { white-space: normal; min-width: 13rem; }
tr:hover td { background: var(--box); }
.worse { color: var(--rtn); font-weight: 700; }
.bar { display: block; height: .7rem; min-width: 1px; border-radius: 2px; background: var(--gptq); }
.bars td:last-child { width: 100%; min-width: 6rem; }
.bars table { width: 100%; }
@media (max-width: 30rem) { th, td { padding: .3rem .25rem; } }
@media print { .wide, .deviations ul { max-height: none; } }
"""

_COLUMNS = (
    "module",
    "method",
    "bits",
    "group",
    "out × in",
    "loss",
    "RTN loss",
    "loss/RTN",
    "tokens",
    "damping",
    "seconds",
    "reason, deviations",
)


def report_page(report: QuantizeReport, title: str) -> str:
    """A complete HTML document: figures, metrics, the chart of losses, all modules, times, deviations.

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
        _metrics(report),
        "<h2>Loss by module</h2>",
        loss_chart(report.quantized),
        "<h2>Modules</h2>",
        _modules(report.modules),
        _seconds(report.seconds),
        _config(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def _origin(report: QuantizeReport) -> str:
    calibrated = f" Calibrated on {escape(report.calibration)}." if report.calibration else ""
    return f"<p class='soft'>Report of a GPTQ quantization.{calibrated}</p>"


def _tiles(report: QuantizeReport) -> str:
    totals = report.totals()
    ratio = totals["loss"] / totals["rtn_loss"] if totals["rtn_loss"] else math.nan
    tiles = [
        *_before_after(report),
        (f"{totals['modules']}", f"modules quantized, {totals['modules_float']} left float"),
        (bits_label(report), format_bits_per_weight(report.bits_per_weight) if report.weights else "nothing"),
        (format_bytes(report.stored_bytes), f"quantized weights; {format_bytes(2 * report.weights)} in 16 bits"),
        (format_value(ratio, 3), "of round-to-nearest's loss"),
        (f"{report.samples:,}", f"calibration samples, {report.tokens:,} tokens"),
        (f"{totals['seconds']:.1f} s", "total"),
    ]
    shown = [f"<div><b>{escape(figure)}</b><span>{escape(what)}</span></div>" for figure, what in tiles if figure]
    return f"<div class='tiles'>{''.join(shown)}</div>"


def _before_after(report: QuantizeReport) -> Iterator[tuple[str, str]]:
    for metric, values in report.metrics.items():
        before, after = (format_value(values.get(key, math.nan)) for key in ("float", "gptq"))
        if before and after:
            yield f"{before} → {after}", f"{metric}, float → GPTQ"


def _deviations(report: QuantizeReport) -> str:
    deviations = list(report.all_deviations())
    if not deviations:
        return "<p>No differences from the request.</p>"
    listed = "".join(f"<li>{escape(deviation)}</li>" for deviation in deviations)
    return (
        f"<section class='deviations'><h2>Differences from the request ({len(deviations)})</h2>"
        f"<ul>{listed}</ul></section>"
    )


def _metrics(report: QuantizeReport) -> str:
    rows = [
        (m.metric, m.model, format_value(m.value, 5), format_change(m.change), format_percent(m.relative))
        for m in metric_values(report)
    ]
    if not rows:
        return ""
    head = ("metric", "model", "value", "change", "relative")
    return f"<h2>Before and after</h2><div class='wide free'>{_table(head, map(_cells, rows), text=(0, 1))}</div>"


def _modules(modules: Sequence[ModuleReport]) -> str:
    return f"<div class='wide'>{_table(_COLUMNS, map(_module, modules), text=(0, 1, len(_COLUMNS) - 1))}</div>"


def _module(module: ModuleReport) -> list[str]:
    remarks = "; ".join(filter(None, (module.reason, *module.deviations)))
    shape = f"{module.shape[0]} × {module.shape[1]}"
    if module.method == "float":
        return [
            *_cells([module.name, "float", "", "", shape, *[""] * 6]),
            f"<td class='left remarks'>{escape(remarks)}</td>",
        ]
    ratio = module.loss / module.rtn_loss if module.rtn_loss else math.nan
    cells = _cells(
        [
            module.name,
            module.method,
            "" if module.bits is None else str(module.bits),
            "" if module.group_size is None else str(module.group_size),
            shape,
            format_value(module.loss),
            format_value(module.rtn_loss),
            format_value(ratio),
            f"{module.tokens:,}",
            format_value(module.damp_percent),
            f"{module.seconds:.2f}",
        ]
    )
    if ratio > 1:
        cells[7] = f"<td class='worse'>{format_value(ratio)}</td>"
    return [*cells, f"<td class='left remarks'>{escape(remarks)}</td>"]


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
