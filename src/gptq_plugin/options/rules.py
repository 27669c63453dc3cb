"""GPTQModel's `dynamic` rules: their keys, and those that match a module.

Tested by tests/options/test_expression_table.py: through them tables are asked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from gptq_plugin.options.expression_table import ExpressionTable


def rule_regex(pattern: str) -> str:
    """The regular expression of a `dynamic` key, without GPTQModel's ``+:`` or ``-:`` prefix."""
    return pattern[2:] if pattern[:2] in ("+:", "-:") else pattern


def matching_rules(patterns: Iterable[str], name: str) -> list[str]:
    """Those of `dynamic` keys that match a module, in order.

    Raises:
        ValueError: They take too long to be matched (`ExpressionTable`).
    """
    ordered = tuple(patterns)
    return [ordered[place] for place in _table(ordered).matching(name)]


@functools.lru_cache(16)
def _table(patterns: tuple[str, ...]) -> ExpressionTable:
    return ExpressionTable([rule_regex(pattern) for pattern in patterns], "dynamic")
