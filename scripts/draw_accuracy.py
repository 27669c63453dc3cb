"""Draws docs/assets/accuracy.svg, the picture of the README, from the first table of docs/benchmarks/accuracy.md.

python scripts/draw_accuracy.py
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE = REPOSITORY / "docs" / "benchmarks" / "accuracy.md"
PICTURE = REPOSITORY / "docs" / "assets" / "accuracy.svg"

_OURS = "gptq-plugin"
_WIDTH, _HEIGHT = 800, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 470, 70, 348  # of the plot
_LEAST, _MOST = 0.01, 1.0  # of the vertical axis, which is logarithmic
_LABEL_GAP = 19  # pixels between two labels at least

# Light and dark each have a background of their own, so the picture can be read on any page.
_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #3c4043 }
.title { font-size: 16px; font-weight: 600; fill: #1f2328 }
.card { fill: #ffffff; stroke: #d0d7de } .grid { stroke: #e4e8ec }
.line { fill: none; stroke: #8c959f; stroke-width: 2 } .dot { fill: #8c959f } .lead { stroke: #c4cad0 }
.ours .line { stroke: #0b7285; stroke-width: 3 } .ours .dot { fill: #0b7285 }
.ours text { fill: #0b7285; font-weight: 600 }
@media (prefers-color-scheme: dark) {
text { fill: #b8c0c8 } .title { fill: #f0f3f6 }
.card { fill: #151b23; stroke: #3d444d } .grid { stroke: #2a313a }
.line { stroke: #848d97 } .dot { fill: #848d97 } .lead { stroke: #4a525b }
.ours .line { stroke: #4fc3d7 } .ours .dot { fill: #4fc3d7 } .ours text { fill: #4fc3d7 }
}
"""


@dataclass(frozen=True)
class Curve:
    """One tool: its excess loss by bits."""

    name: str
    losses: dict[int, float]


def read_table(text: str) -> list[Curve]:
    """The curves of the first table in Markdown whose head names bits."""
    lines = text.splitlines()
    head = next(number for number, line in enumerate(lines) if re.match(r"\|.*\| *\d bits *\|", line))
    widths = [int(cell.split()[0]) for cell in _cells(lines[head])[1:]]
    curves = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        name, *losses = _cells(line)
        curves.append(Curve(name.replace("`", ""), dict(zip(widths, map(float, losses), strict=True))))
    return curves


def draw(curves: list[Curve]) -> str:
    """The picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        "<title>Loss above the float model at 4, 3 and 2 bits, lower is better</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="8"/>',
        '<text class="title" x="24" y="30">Loss above the float model (lower is better)</text>',
        '<text x="24" y="49">29 M-parameter Llama, group 128, symmetric</text>',
    ]
    for loss in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        y = _y(loss)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    widths = sorted(curves[0].losses, reverse=True)
    for bits in widths:
        parts.append(f'<text x="{_x(bits, widths):.1f}" y="{_BOTTOM + 24}" text-anchor="middle">{bits} bits</text>')
    ends = _apart([_y(curve.losses[widths[-1]]) for curve in curves])
    ours_last = sorted(zip(curves, ends, strict=True), key=lambda pair: pair[0].name.startswith(_OURS))
    for curve, label in ours_last:  # on top of the others
        points = [(_x(bits, widths), _y(curve.losses[bits])) for bits in widths]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append('<g class="ours">' if curve.name.startswith(_OURS) else "<g>")
        parts.append(f'<polyline class="line" points="{path}"/>')
        parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
        x, y = points[-1]
        parts.append(f'<line class="lead" x1="{x + 7:.1f}" x2="{x + 20:.1f}" y1="{y:.1f}" y2="{label:.1f}"/>')
        parts.append(f'<text x="{x + 25:.1f}" y="{label + 4:.1f}">{escape(curve.name)}</text></g>')
    return "\n".join([*parts, "</svg>", ""])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _x(bits: int, widths: list[int]) -> float:
    inner = (_RIGHT - _LEFT - 60) / (len(widths) - 1)
    return _LEFT + 30 + inner * widths.index(bits)


def _y(loss: float) -> float:
    share = math.log(loss / _LEAST) / math.log(_MOST / _LEAST)
    return _BOTTOM - share * (_BOTTOM - _TOP)


def _apart(heights: list[float]) -> list[float]:
    """The heights of labels beside points, at least `_LABEL_GAP` apart."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = dict(zip(order, (heights[number] for number in order), strict=True))
    for _ in range(100):
        for above, below in pairwise(order):
            short = _LABEL_GAP - (placed[below] - placed[above])
            if short > 0.01:
                placed[above] -= short / 2
                placed[below] += short / 2
    return [placed[number] for number in range(len(heights))]


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(read_table(TABLE.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"{PICTURE.relative_to(REPOSITORY)} drawn")
