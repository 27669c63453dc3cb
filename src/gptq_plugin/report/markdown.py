"""Text as Markdown, for model cards: snippets, tables, escaped text, code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from gptq_plugin.report.provenance import strip_paths


def snippet(title: str, code: str, language: str = "python") -> str:
    """A section with a block of code."""
    return f"### {title}\n\n```{language}\n{code}\n```"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def escaped(text: str) -> str:
    """Escapes a text for Markdown, on one line, with paths of this machine cut to their last part."""
    line = strip_paths(" ".join(text.split()))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|#~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def code(setting: Any) -> str:
    """A value in backticks for a table, with bars and backticks, which would end the cell or the code, escaped."""
    text = str(setting).lower() if isinstance(setting, bool) else str(setting)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return fence + space + " ".join(text.split()).replace("|", "\\|") + space + fence
