"""Many expressions asked about many names: `ExpressionTable`.

An export may have an exact rule for each of ten thousand experts, and a stranger's description as many expressions that
match slowly. So an expression is only tried with names that begin as it does, no name twice, and the time is limited.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from gptq_plugin.options.expressions import literal_beginning, matches

_SECONDS = 5.0  # of this thread, for all names; rules that people write take milliseconds
_AT_ONCE = 100  # expressions between two looks at the clock


class ExpressionTable:
    """Expressions in order.

    Args:
        expressions: Regular expressions.
        what: What they are, for an error: "dynamic".
    """

    def __init__(self, expressions: Sequence[str], what: str) -> None:
        self._expressions = expressions
        self._what = what
        self._by_beginning: dict[str, list[int]] = defaultdict(list)
        for place, expression in enumerate(expressions):
            self._by_beginning[literal_beginning(expression)].append(place)
        self._lengths = sorted({len(beginning) for beginning in self._by_beginning})
        self._known: dict[str, list[int]] = {}
        self._left = _SECONDS

    def matching(self, name: str) -> list[int]:
        """The places of the expressions that match the name from its start, in order.

        Raises:
            ValueError: An expression cannot be matched, or all the names asked about took too long.
        """
        if name not in self._known:
            beginnings = (name[:length] for length in self._lengths if length <= len(name))
            places = sorted(place for beginning in beginnings for place in self._by_beginning.get(beginning, ()))
            found: list[int] = []
            for start in range(0, len(places), _AT_ONCE):
                found += self._tried(places[start : start + _AT_ONCE], name)
            self._known[name] = found
        return self._known[name]

    def _tried(self, places: Sequence[int], name: str) -> list[int]:
        if self._left < 0:
            raise ValueError(
                f"{self._what}: {len(self._expressions)} expressions take more than {_SECONDS:.0f} s to be matched "
                "with names: write fewer or simpler ones, which begin with the names' first letters"
            )
        start = time.thread_time()
        try:
            return [place for place in places if matches(self._expressions[place], name)]
        finally:  # one that takes too many steps with a name may do so with every name
            self._left -= time.thread_time() - start
