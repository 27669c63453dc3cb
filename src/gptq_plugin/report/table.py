"""Layers as lines of text: `layer_table`, one line a layer; `kind_table`, one line for layers alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.numbers import align, format_share, format_value
from gptq_plugin.walk.kinds import kind_of

_HEAD = (
    "module",
    "method",
    "bits",
    "group",
    "out x in",
    "relative error",
    "loss",
    "RTN loss",
    "loss/RTN",
    "tokens",
    "damp",
    "s",
)
_NARROW = ("module", "bits", "group", "out x in", "relative error", "loss/RTN")


def layer_table(modules: Sequence[ModuleReport], *, narrow: bool = False) -> list[str]:
    """A head, and a line for each module; a reason stands at the line's end.

    Args:
        modules: A report's.
        narrow: Only the columns that fit a terminal.
    """
    kept = [number for number, title in enumerate(_HEAD) if not narrow or title in _NARROW]
    lines = align([[row[number] for number in kept] for row in (_HEAD, *map(_row, modules))])
    reasons = ["", *(module.reason for module in modules)]
    return [f"{line}  {reason}" if reason else line for line, reason in zip(lines, reasons, strict=True)]


def kind_table(modules: Sequence[ModuleReport]) -> list[str]:
    """A head, and a line for each kind of module: those whose names differ in numbers only."""
    kinds: dict[str, list[ModuleReport]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module.name), []).append(module)
    rows = [_kind(name, members) for name, members in kinds.items()]
    return align([("modules", "number", "bits", "out x in", "worst relative error", "loss/RTN", "s"), *rows])


def bits_counts(modules: Sequence[ModuleReport]) -> str:
    """The widths of modules, such as ``4``, or ``4 (30), 8 (2)`` with the number of modules; ``float``."""
    counts: dict[str, int] = {}
    for module in sorted(modules, key=lambda module: module.bits or 99):
        width = "float" if module.bits is None else str(module.bits)
        counts[width] = counts.get(width, 0) + 1
    return next(iter(counts), "") if len(counts) < 2 else ", ".join(f"{width} ({n})" for width, n in counts.items())


def _row(module: ModuleReport) -> tuple[str, ...]:
    shape = f"{module.shape[0]} x {module.shape[1]}"
    if module.method == "float":
        return (module.name, "float", "", "", shape, *[""] * 7)
    return (
        module.name,
        module.method,
        str(module.bits),
        str(module.group_size),
        shape,
        format_share(module.relative_error),
        format_value(module.loss),
        format_value(module.rtn_loss),
        format_value(module.loss / module.rtn_loss) if module.rtn_loss else "",
        str(module.tokens),
        format_value(module.damp_percent),
        f"{module.seconds:.2f}",
    )


def _kind(name: str, members: Sequence[ModuleReport]) -> tuple[str, ...]:
    shapes = {f"{m.shape[0]} x {m.shape[1]}": None for m in members}
    errors = [m.relative_error for m in members if not math.isnan(m.relative_error)]
    known = [m for m in members if math.isfinite(m.loss) and math.isfinite(m.rtn_loss)]
    rtn_loss = sum(m.rtn_loss for m in known)
    ratio = sum(m.loss for m in known) / rtn_loss if rtn_loss else math.nan
    return (
        name if len(members) > 1 else members[0].name,
        str(len(members)),
        bits_counts(members),
        next(iter(shapes)) if len(shapes) == 1 else "several",
        format_share(max(errors, default=math.nan)),
        format_value(ratio),
        f"{sum(m.seconds for m in members):.2f}",
    )
