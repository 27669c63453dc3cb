"""The page's chart: the error of every module, GPTQ's beside round-to-nearest's, as SVG within HTML.

Each kind of module (names that differ only in numbers) has a band with one line per module, in the model's order.
Horizontal positions are percentages and all else is pixels, so that the chart fits a phone at full text size.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.numbers import format_share, format_value
from gptq_plugin.report.table import bits_counts
from gptq_plugin.walk.kinds import kind_of

_LABEL, _GAP, _AXIS = 18, 12, 22  # pixels: a band's label, the space below a band, an axis's labels
_LINE, _CHARACTERS = 14, 54  # pixels of a label's line, and the most characters in it: 390 pixels' worth
_PITCH = 14  # pixels between modules of a small band
_SMALL, _LARGE = 140, 240  # pixels: heights up to which bands grow at full pitch, and at the reduced one
_LEFT, _RIGHT = 4.0, 96.0  # percent of the width
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class _Measure:
    """What the chart shows of a module.

    Attributes:
        name: Of the axis.
        explained: A sentence's beginning.
        gptq, rtn: The module's value, and round-to-nearest's.
        shown: A value as text.
    """

    name: str
    explained: str
    gptq: Callable[[ModuleReport], float]
    rtn: Callable[[ModuleReport], float]
    shown: Callable[[float], str]


_LOSS = _Measure(
    "loss",
    "<strong>Loss of every module</strong>: mean over tokens of the squared output error.",
    lambda module: module.loss,
    lambda module: module.rtn_loss,
    format_value,
)
_RELATIVE = _Measure(
    "relative error",
    "<strong>Relative error of every module</strong>: mean over tokens of the squared output error, as a share of the "
    "output's mean square.",
    lambda module: module.relative_error,
    lambda module: module.rtn_relative_error,
    format_share,
)


def error_chart(modules: Sequence[ModuleReport]) -> str:
    """The figure, or a sentence if no loss is known. It shows relative errors, or losses if some of those are unknown.

    Args:
        modules: A report's. Those with an unknown loss (NaN) are left out; a loss of 0, which a logarithmic axis cannot
            show, stands at its left end.
    """
    known = [m for m in modules if math.isfinite(m.loss)]
    measure = _RELATIVE if all(math.isfinite(m.relative_error) for m in known) else _LOSS
    positive = [x for m in known for x in (measure.gptq(m), measure.rtn(m)) if math.isfinite(x) and x > 0]
    if not positive:
        return "<p>No module's loss is known: nothing was calibrated.</p>"
    scale = _Scale(min(positive), max(positive))
    bands: dict[str, list[ModuleReport]] = defaultdict(list)
    for module in known:
        bands[kind_of(module.name)].append(module)
    widths = sorted({module.bits for module in known if module.bits is not None})

    parts: list[str] = []
    top = _AXIS
    for kind, members in bands.items():
        pitch = _pitch(len(members))
        parts.append(f"<line class='grid' x1='0' x2='100%' y1='{top - 2}' y2='{top - 2}'/>")
        for line in _label_lines(kind, members, with_bits=len(widths) > 1):
            parts.append(f"<text class='kind' x='0' y='{top + 13}'>{line}</text>")
            top += _LINE
        top += _LABEL - _LINE
        for place, module in enumerate(members):
            parts.extend(_marks(module, measure, scale, top + pitch * (place + 0.5), pitch, with_bits=len(widths) > 1))
        top = math.ceil(top + pitch * len(members)) + _GAP
    grid = [line for tick in scale.ticks() for line in _tick(scale.at(tick), _label(tick, measure), top)]
    height = top + _AXIS
    drawn = len(known)
    left_out = len(modules) - drawn
    note = f" {left_out} without a known loss {'is' if left_out == 1 else 'are'} not drawn." if left_out else ""
    return (
        f"<figure><figcaption>{measure.explained} Left is better. First blocks on top.{note}"
        f"{_legend(widths if len(widths) > 1 else [])}</figcaption>"
        f"<svg class='chart' width='100%' height='{height + 18}' role='img' "
        f"aria-label='{measure.name} of {drawn} modules, GPTQ beside round-to-nearest, on a logarithmic axis'>"
        f"{''.join(grid)}{''.join(parts)}"
        f"<text class='axis' x='50%' y='{height + 10}'>{measure.name} (logarithmic)</text></svg></figure>"
    )


def _legend(widths: Sequence[int]) -> str:
    """The marks' meaning; the colours of widths too, if there are several."""
    marks = f"<span>{_key('gptq')} GPTQ</span><span>{_key('rtn')} round-to-nearest</span>"
    bits = "".join(
        f"<span><svg width='12' height='12' aria-hidden='true'><rect class='bits{width}' width='12' height='12'/></svg>"
        f" {width} bits</span>"
        for width in widths
    )
    return f"<div class='legend'>{marks}{bits}</div>"


def _label_lines(kind: str, members: Sequence[ModuleReport], *, with_bits: bool) -> list[str]:
    """A band's label, of lines that fit a phone: the modules' name, how many they are, and their bits."""
    lines = [""]
    for part in re.findall(r"[^.]+\.?|\.", kind if len(members) > 1 else members[0].name):
        if len(lines[-1]) + len(part) > _CHARACTERS and lines[-1]:
            lines.append("")
        lines[-1] += part
    notes = [f"{len(members)} modules"] if len(members) > 1 else []
    notes += [f"bits: {bits_counts(members)}"] if with_bits else []
    note = ", ".join(notes)
    tspan = f"<tspan class='soft'>{note}</tspan>"
    if not note:
        return [escape(line) for line in lines]
    if len(lines[-1]) + 1 + len(note) > _CHARACTERS:
        return [*map(escape, lines), tspan]
    return [*map(escape, lines[:-1]), f"{escape(lines[-1])} {tspan}"]


class _Scale:
    """Maps losses to percent of the width, logarithmically."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = math.log10(low), math.log10(high)
        if self.high - self.low < 0.2:  # do not magnify tiny differences
            middle = (self.low + self.high) / 2
            self.low, self.high = middle - 0.3, middle + 0.3

    def at(self, loss: float) -> float:
        if loss <= 0:
            return _LEFT
        return round(_LEFT + (_RIGHT - _LEFT) * (math.log10(loss) - self.low) / (self.high - self.low), 2)

    def ticks(self) -> list[float]:
        """Round losses within the range: powers of ten, with 2 and 5 between them if they are few."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps: tuple[int, ...] = (1, 2, 5) if self.high - self.low < 1.5 else (1,)
        every = max(1, math.ceil((self.high - self.low) / 7))
        return [s * 10.0**d for d in decades if not d % every for s in steps if self._holds(s * 10.0**d)]

    def _holds(self, loss: float) -> bool:
        return self.low - 1e-9 <= math.log10(loss) <= self.high + 1e-9


def _pitch(count: int) -> float:
    return min(_PITCH, max(_SMALL / count, min(4.0, _LARGE / count)))


def _marks(
    module: ModuleReport, measure: _Measure, scale: _Scale, y: float, pitch: float, *, with_bits: bool
) -> Iterator[str]:
    """A module's marks: both values and the line between them, the colour of its bits at the right end, the figures as
    tooltip."""
    radius = round(min(4.5, max(1.5, pitch * 0.42)), 2)
    y, top = round(y, 2), round(y - pitch / 2, 2)
    value, rtn_value = measure.gptq(module), measure.rtn(module)
    gptq, text = scale.at(value), f"{module.name}: {measure.shown(value)}"
    marks = f"<circle class='gptq' cx='{gptq}%' cy='{y}' r='{radius}'/>"
    if math.isfinite(rtn_value):
        rtn, text = scale.at(rtn_value), f"{text}, round-to-nearest {measure.shown(rtn_value)}"
        marks = (
            f"<line class='link' x1='{gptq}%' x2='{rtn}%' y1='{y}' y2='{y}'/>"
            f"<circle class='rtn' cx='{rtn}%' cy='{y}' r='{radius}'/>{marks}"
        )
    if with_bits:
        text = f"{text}, {module.bits} bits"
        height = round(max(1.0, pitch - 1), 2)
        marks += f"<rect class='bits{module.bits}' x='98%' width='2%' y='{top}' height='{height}'/>"
    hit = f"<rect class='hit' x='0' width='100%' y='{top}' height='{round(pitch, 2)}'/>"
    yield f"<g><title>{escape(text)}</title>{hit}{marks}</g>"


def _tick(x: float, label: str, bottom: int) -> Iterator[str]:
    yield f"<line class='grid' x1='{x}%' x2='{x}%' y1='{_AXIS - 4}' y2='{bottom}'/>"
    for y in (_AXIS - 8, bottom + 14):
        yield f"<text class='axis' x='{x}%' y='{y}'>{label}</text>"


def _label(tick: float, measure: _Measure) -> str:
    """Label of a tick: 0.01, 500, 2·10⁻⁵; as a percentage if the values are shares."""
    return f"{_number(100 * tick)} %" if measure is _RELATIVE else _number(tick)


def _number(tick: float) -> str:
    if 1e-3 <= tick * (1 + 1e-9) < 1e5:
        return f"{tick:g}"
    mantissa, exponent = f"{tick:.0e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _key(kind: str) -> str:
    return f"<svg width='12' height='12' aria-hidden='true'><circle class='{kind}' cx='6' cy='6' r='4.5'/></svg>"
