"""Formats numbers and tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence


def format_bytes(count: int) -> str:
    """Three digits and a decimal unit: 123 kB."""
    if count < 1000:
        return f"{count} B"
    power = min(3, int(math.log10(count)) // 3)
    return f"{count / 1000**power:.3g} {('kB', 'MB', 'GB')[power - 1]}"


def format_bits_per_weight(number: float) -> str:
    """The size of quantized layers as an average, with what is counted (`checkpoint.sizes.stored_bytes`)."""
    return f"{number:.2f} bits per weight (scales and zeros included, g_idx not)"


def format_value(number: float, digits: int = 4) -> str:
    """`digits` significant digits; blank if unknown (NaN)."""
    return "" if math.isnan(number) else f"{number:.{digits}g}"


def format_share(number: float) -> str:
    """A fraction as a percentage of three significant digits; blank if unknown (NaN)."""
    if math.isnan(number):
        return ""
    percent = 100 * number
    return f"{percent:.3g} %" if percent == 0 or percent >= 1e-4 else f"{percent:.1e} %"


def format_change(number: float) -> str:
    """With its sign; blank if unknown (NaN)."""
    return "" if math.isnan(number) else f"{number:+.3g}"


def format_percent(number: float) -> str:
    """A fraction as a percentage with its sign; blank if unknown (NaN)."""
    if math.isnan(number):
        return ""
    percent = 100 * number
    return f"{percent:+.2f} %" if percent == 0 or abs(percent) >= 0.005 else f"{percent:+.1g} %"


def align(rows: Sequence[Sequence[str]], *, numeric: bool = True) -> list[str]:
    """Rows as lines of aligned columns: the first flush left, the others flush right if `numeric`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [c.rjust(w) if numeric else c.ljust(w) for c, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
