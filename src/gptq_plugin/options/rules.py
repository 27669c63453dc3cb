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


class RuleTable:
    """Keys of `dynamic`, in order.

    Args:
        patterns: The keys.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)
        self._table = ExpressionTable([rule_regex(pattern) for pattern in self._patterns], "dynamic")

    def matching(self, name: str) -> list[str]:
        """Those that match a module, in order.

        Raises:
            ValueError: They take too long to be matched (`ExpressionTable`).
        """
        return [self._patterns[place] for place in self._table.matching(name)]


def matching_rules(patterns: Iterable[str], name: str) -> list[str]:
    """`RuleTable.matching` for one name. For many names and thousands of rules, make a table: here each name costs as
    much as there are rules."""
    return _table(tuple(patterns)).matching(name)


_table = functools.lru_cache(16)(RuleTable)
