"""The table of layers on report.html, the worst on top: `layers_table`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from gptq_plugin.report.deviations import Deviation
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.numbers import format_share, format_value

_COLUMNS = (
    "module",
    "bits",
    "group",
    "out × in",
    "relative error",
    "loss",
    "RTN loss",
    "loss/RTN",
    "tokens",
    "damping",
    "seconds",
    "differs",
    "place",
)
_SORTED, _WORDS = "relative error", ("module",)


@dataclass(frozen=True)
class _Cell:
    """A figure and what it is sorted by; a key of NaN is none."""

    text: str
    key: float
    kind: str = ""


def layers_table(modules: Sequence[ModuleReport], deviations: Sequence[Deviation]) -> str:
    """The table, by relative error from the largest on; layers whose error is unknown follow, float ones at last.

    Args:
        modules: In the model's order, which the column "place" keeps.
        deviations: As the page numbers them; "differs" names the numbers of a layer's own.
    """
    differs: dict[str, list[int]] = defaultdict(list)
    for number, deviation in enumerate(deviations, 1):
        for name in deviation.modules:
            differs[name].append(number)
    placed = sorted(enumerate(modules, 1), key=lambda pair: _order(pair[1]))
    heads = "".join(_head(title) for title in _COLUMNS)
    rows = "".join(_row(module, place, differs) for place, module in placed)
    wide = "<div class='wide'>" if len(modules) > 30 else "<div class='wide free'>"
    return (
        "<p class='soft'>The largest relative error first: loss as a share of the output's mean square. A click on a "
        "head sorts. “differs” names the differences from the request above.</p>"
        f"{wide}<table class='layers'><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _order(module: ModuleReport) -> tuple[bool, bool, float]:
    error = module.relative_error
    return module.method == "float", math.isnan(error), 0.0 if math.isnan(error) else -error


def _head(title: str) -> str:
    attributes = " class=left data-first='up'" if title in _WORDS else ""
    attributes += " data-first='up'" if title == "place" else ""
    attributes += " data-sorted='descending'" if title == _SORTED else ""
    return f"<th{attributes}>{escape(title)}</th>"


def _row(module: ModuleReport, place: int, differs: Mapping[str, Sequence[int]]) -> str:
    name = escape(module.name)
    cells = [f"<td class='left' data-key='{name}'>{name.replace('.', '.<wbr>')}{_remark(module)}</td>"]
    figures = zip(_COLUMNS[1:], _figures(module, place, differs[module.name]), strict=True)
    for title, cell in figures:
        key = "" if math.isnan(cell.key) else f"{cell.key:g}".replace("inf", "Infinity")  # as JavaScript reads it
        kind = f" class='{cell.kind}'" if cell.kind else ""
        cells.append(f"<td{kind} data-title='{title}' data-key='{key}'>{escape(cell.text)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _remark(module: ModuleReport) -> str:
    return f"<br><span class='soft'>{escape(module.reason)}</span>" if module.reason else ""


def _figures(module: ModuleReport, place: int, differences: Sequence[int]) -> Iterator[_Cell]:
    out_features, in_features = module.shape
    ratio = module.loss / module.rtn_loss if module.rtn_loss else math.nan
    is_float = module.method == "float"
    width = "float" if is_float else f"{module.bits}{' rtn' if module.method == 'rtn' else ''}"
    unknown = math.nan if is_float else 0.0  # nan + x is nan
    yield _Cell(width, unknown + (module.bits or 0))
    yield _Cell("" if is_float else str(module.group_size), unknown + (module.group_size or 0))
    yield _Cell(f"{out_features} × {in_features}", out_features * in_features)
    yield _Cell(format_share(module.relative_error), module.relative_error)
    yield _Cell(format_value(module.loss), module.loss)
    yield _Cell(format_value(module.rtn_loss), module.rtn_loss)
    yield _Cell(format_value(ratio), ratio, "worse" if ratio > 1 else "")
    yield _Cell("" if is_float else f"{module.tokens:,}", unknown + module.tokens)
    yield _Cell(format_value(module.damp_percent), module.damp_percent)
    yield _Cell("" if is_float else f"{module.seconds:.2f}", unknown + module.seconds)
    yield _Cell(", ".join(map(str, differences)), differences[0] if differences else math.nan)
    yield _Cell(str(place), place)
