"""The page's chart: the loss of every module, GPTQ's beside round-to-nearest's, as SVG within HTML.

Each kind of module (names that differ only in numbers) has a band with one line per module, in the model's order.
Horizontal positions are percentages and all else is pixels, so that the chart fits a phone at full text size.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape

from gptq_plugin.report.numbers import format_value
from gptq_plugin.report.report import ModuleReport

_LABEL, _GAP, _AXIS = 18, 12, 22  # pixels: a band's label, the space below a band, an axis's labels
_PITCH = 14  # pixels between modules of a small band
_SMALL, _LARGE = 140, 240  # pixels: heights up to which bands grow at full pitch, and at the reduced one
_LEFT, _RIGHT = 4.0, 96.0  # percent of the width
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def loss_chart(modules: Sequence[ModuleReport]) -> str:
    """The figure, or a sentence if no loss is known.

    Args:
        modules: A report's. Those with an unknown loss (NaN) are left out; a loss of 0, which a logarithmic axis cannot
            show, stands at its left end.
    """
    known = [m for m in modules if math.isfinite(m.loss)]
    positive = [x for m in known for x in (m.loss, m.rtn_loss) if math.isfinite(x) and x > 0]
    if not positive:
        return "<p>No module's loss is known: nothing was calibrated.</p>"
    scale = _Scale(min(positive), max(positive))
    bands: dict[str, list[ModuleReport]] = defaultdict(list)
    for module in known:
        bands[re.sub(r"\d+", "*", module.name)].append(module)

    parts: list[str] = []
    top = _AXIS
    for kind, members in bands.items():
        pitch = _pitch(len(members))
        label = kind if len(members) > 1 else members[0].name
        count = f" <tspan class='soft'>{len(members)} modules</tspan>" if len(members) > 1 else ""
        parts.append(f"<line class='grid' x1='0' x2='100%' y1='{top - 2}' y2='{top - 2}'/>")
        parts.append(f"<text class='kind' x='0' y='{top + 13}'>{escape(label)}{count}</text>")
        top += _LABEL
        for place, module in enumerate(members):
            parts.extend(_marks(module, scale, top + pitch * (place + 0.5), pitch))
        top = math.ceil(top + pitch * len(members)) + _GAP
    grid = [line for tick in scale.ticks() for line in _tick(scale.at(tick), _number(tick), top)]
    height = top + _AXIS
    drawn = len(known)
    left_out = len(modules) - drawn
    note = f" {left_out} without a known loss {'is' if left_out == 1 else 'are'} not drawn." if left_out else ""
    return (
        "<figure><figcaption><strong>Loss of every module</strong>: mean over tokens of the squared output error. "
        "Left is better. First blocks on top."
        f"{note}<div class='legend'><span>{_key('gptq')} GPTQ</span><span>{_key('rtn')} round-to-nearest</span></div>"
        "</figcaption>"
        f"<svg class='chart' width='100%' height='{height + 18}' role='img' "
        f"aria-label='Loss of {drawn} modules, GPTQ beside round-to-nearest, on a logarithmic axis'>"
        f"{''.join(grid)}{''.join(parts)}"
        f"<text class='axis' x='50%' y='{height + 10}'>loss (logarithmic)</text></svg></figure>"
    )


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


def _marks(module: ModuleReport, scale: _Scale, y: float, pitch: float) -> Iterator[str]:
    """A module's marks: both losses and the line between them, with the figures as tooltip."""
    radius = round(min(4.5, max(1.5, pitch * 0.42)), 2)
    y = round(y, 2)
    gptq, text = scale.at(module.loss), f"{module.name}: {format_value(module.loss)}"
    marks = f"<circle class='gptq' cx='{gptq}%' cy='{y}' r='{radius}'/>"
    if math.isfinite(module.rtn_loss):
        rtn, text = scale.at(module.rtn_loss), f"{text}, round-to-nearest {format_value(module.rtn_loss)}"
        marks = (
            f"<line class='link' x1='{gptq}%' x2='{rtn}%' y1='{y}' y2='{y}'/>"
            f"<circle class='rtn' cx='{rtn}%' cy='{y}' r='{radius}'/>{marks}"
        )
    hit = f"<rect class='hit' x='0' width='100%' y='{round(y - pitch / 2, 2)}' height='{round(pitch, 2)}'/>"
    yield f"<g><title>{escape(text)}</title>{hit}{marks}</g>"


def _tick(x: float, label: str, bottom: int) -> Iterator[str]:
    yield f"<line class='grid' x1='{x}%' x2='{x}%' y1='{_AXIS - 4}' y2='{bottom}'/>"
    for y in (_AXIS - 8, bottom + 14):
        yield f"<text class='axis' x='{x}%' y='{y}'>{label}</text>"


def _number(tick: float) -> str:
    """Label of a tick: 0.01, 500, 2·10⁻⁵."""
    if 1e-3 <= tick < 1e5:
        return f"{tick:g}"
    mantissa, exponent = f"{tick:.0e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _key(kind: str) -> str:
    return f"<svg width='12' height='12' aria-hidden='true'><circle class='{kind}' cx='6' cy='6' r='4.5'/></svg>"
