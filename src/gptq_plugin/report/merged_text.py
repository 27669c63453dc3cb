"""A generated text that was edited by hand and is generated again: `merged`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple


class _Change(NamedTuple):
    """Lines `start` to `end` of the first text are `lines` in another."""

    start: int
    end: int
    lines: Sequence[str]

    def overlaps(self, other: _Change) -> bool:
        for one, another in ((self, other), (other, self)):
            if one.start == one.end:  # an insertion
                return another.start < one.start < another.end
        return max(self.start, other.start) < min(self.end, other.end)


def merged(before: str, edited: str, after: str) -> tuple[str, list[str]]:
    """Merges what a person changed with what a program changed, line by line. Where both did, the person's lines stay.

    Args:
        before: The text as it was generated.
        edited: The same as a person left it.
        after: The text as it is generated now.

    Returns:
        The merged text, and the lines of `after` that are not in it because a person rewrote their place.
    """
    lines = before.splitlines()
    by_hand = _changes(lines, edited.splitlines())
    generated = _changes(lines, after.splitlines())
    kept: list[_Change] = []
    lost: list[str] = []
    for change in generated:
        others = [one for one in by_hand if change.overlaps(one)]
        if not others:
            kept.append(change)
        elif any(one.lines for one in others):  # else the place was deleted, and nothing there is wrong
            lost += change.lines
    result: list[str] = []
    at = 0
    for start, end, new in sorted([*by_hand, *kept], key=lambda change: (change.start, change.end)):
        result += [*lines[at:start], *new]
        at = end
    return "\n".join([*result, *lines[at:]]) + "\n", [line for line in lost if line]


def _changes(lines: Sequence[str], others: Sequence[str]) -> list[_Change]:
    matcher = SequenceMatcher(None, lines, others, autojunk=False)
    return [_Change(i, j, others[k:m]) for tag, i, j, k, m in matcher.get_opcodes() if tag != "equal"]
