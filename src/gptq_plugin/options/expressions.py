"""Matches regular expressions that a stranger wrote, in time that grows with no power of their own: `matches`.

Rules of checkpoints and configurations are Python's expressions, and Python's matcher backtracks: ``(a+)+b`` takes
longer than a life on a name of 60 letters. RE2 does not, but lacks the lookaheads that published checkpoints have. So
Python parses an expression and matches its characters, and runs it as a whole if there are few ways through a name.
Otherwise the positions that each part can reach are computed, once for each start, in a limited number of steps. Names
that are only escaped, as most rules of files are, need neither.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gptq_plugin.options.fields import shown

try:
    from re import _compiler, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile as _compiler  # type: ignore[no-redef]
    import sre_parse as _parser  # type: ignore[no-redef]

_FEW = 20_000  # ways through a name that backtracking may try: less than a millisecond
_LENGTHS = (16, 32, 48, 64, 96, 128, 256, 1024, 2**16)  # of names, in letters
_DEEPEST = 50  # groups in each other
_STEPS = 500_000  # through an expression and a name: a second
_KNOWN = 2**14  # expressions that are kept
_NAME = re.compile(r"\^?((?:[\w/-]|\\[^A-Za-z0-9])*)(\$?)", re.DOTALL)  # an escaped name

_REPEATS, _LOOKS = ("MAX_REPEAT", "MIN_REPEAT"), ("ASSERT", "ASSERT_NOT")
_BACK = ("GROUPREF", "GROUPREF_EXISTS", "GROUPREF_IGNORE", "ATOMIC_GROUP", "POSSESSIVE_REPEAT")
_STRUCTURE = ("BRANCH", "SUBPATTERN", *_REPEATS, *_LOOKS, *_BACK)  # Python's names; all others take a character or none


def matches(expression: str, name: str) -> bool:
    """True if the expression matches the name from its start, as ``re.match`` does.

    Raises:
        ValueError: See `check_expression`; or it takes too many steps.
    """
    return _parsed(expression).matches(name)


def check_expression(expression: str) -> None:
    """Refuses what cannot be matched.

    Raises:
        ValueError: It is no regular expression, is nested too deeply, or has a group that is referred to or does not
            backtrack, which only backtracking can match.
    """
    _parsed(expression)


def is_name(expression: str) -> bool:
    """True for an escaped name, anchored or not: nothing in it has to be parsed."""
    return _NAME.fullmatch(expression) is not None


def literal_beginning(expression: str) -> str:
    """Letters with which every name begins that the expression matches; empty if there are none.

    Raises:
        ValueError: See `check_expression`.
    """
    return _parsed(expression).beginning


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of an expression.

    Attributes:
        kind: "character" (several in a row too), "any of", "repeat", "ahead" or "behind".
        choices: Its parts: sequences to choose from; of others than "any of", one.
        least, most: Of a repetition; of what is behind, its width.
        pattern: Of a character.
        absent: Of what is ahead or behind: it must not be.
    """

    kind: str
    choices: tuple[tuple[_Part, ...], ...] = ()
    least: int = 0
    most: float = 0
    pattern: Any = None
    absent: bool = False

    @property
    def depth(self) -> int:
        """Parts in each other."""
        return 1 + max((part.depth for choice in self.choices for part in choice), default=0)

    def ways(self, length: int) -> float:
        """An upper bound of the ways that a backtracking matcher can take through a name."""
        each = sum(_ways(choice, length) for choice in self.choices)
        if self.kind != "repeat":
            return max(each, 1)
        if each == 1:
            return min(self.most - self.least, length) + 1
        if self.most > 8:
            return math.inf
        return sum(each**times for times in range(self.least, int(self.most) + 1))


def _ways(parts: Iterable[_Part], length: int) -> float:
    """An upper bound of the ways through a name that a sequence of parts leaves; infinity if they are not few."""
    found: float = 1
    for part in parts:
        found *= part.ways(length)
        if found > _FEW:
            return math.inf
    return found


@dataclass(frozen=True)
class _Name:
    """An escaped name.

    Attributes:
        beginning: Letters with which all names begin that it matches.
        is_whole: And end.
    """

    beginning: str
    is_whole: bool

    def matches(self, name: str) -> bool:
        return name.startswith(self.beginning) and (not self.is_whole or name[len(self.beginning) :] in ("", "\n"))


@dataclass(frozen=True)
class _Expression:
    """A parsed expression.

    Attributes:
        text: It.
        whole: Safe for names of up to `short` letters.
        parts: In order.
        beginning: Letters with which all names begin that it matches.
    """

    text: str
    whole: re.Pattern[str]
    parts: tuple[_Part, ...]
    short: int
    beginning: str

    @classmethod
    def of(cls, text: str, whole: re.Pattern[str], parts: tuple[_Part, ...], beginning: str) -> _Expression:
        safe = (n for n in _LENGTHS if _ways(parts, n) <= _FEW)
        return cls(text, whole, parts, max(safe, default=-1), beginning)

    def matches(self, name: str) -> bool:
        if len(name) <= self.short:
            return self.whole.match(name) is not None
        return bool(_Walk(self.text, name).after(self.parts, 1))


class _Walk:
    """The positions that parts of an expression can reach in a name; sets of positions are the bits of an integer."""

    def __init__(self, expression: str, name: str) -> None:
        self._expression, self._name = expression, name
        self._steps = 0
        self._known: dict[tuple[_Part, int], int] = {}

    def after(self, parts: Iterable[_Part], starts: int) -> int:
        """The ends of a sequence of parts.

        Raises:
            ValueError: They take too many steps.
        """
        for part in parts:
            self._step()
            if part.kind == "repeat" and [one.kind for one in part.choices[0]] == ["character"]:
                starts = self._repeated(part, starts)
                continue
            ends = 0
            for start in _bits(starts):
                if (part, start) not in self._known:
                    self._known[part, start] = self._ends(part, start)
                ends |= self._known[part, start]
            starts = ends
        return starts

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _STEPS:
            raise ValueError(
                f"{shown(self._expression)} takes more than {_STEPS:,} steps to be matched with {shown(self._name)}: "
                "write a simpler expression"
            )

    def _ends(self, part: _Part, start: int) -> int:
        self._step()
        here = 1 << start
        if part.kind == "any of":
            return functools.reduce(lambda ends, choice: ends | self.after(choice, here), part.choices, 0)
        if part.kind == "repeat":
            return self._repeated(part, here)
        if part.kind == "ahead":
            return here if bool(self.after(part.choices[0], here)) != part.absent else 0
        if part.kind == "behind":
            there = start >= part.least and self.after(part.choices[0], 1 << (start - part.least)) & here
            return here if bool(there) != part.absent else 0
        found = part.pattern.match(self._name, start)
        return 0 if found is None else 1 << found.end()

    def _repeated(self, part: _Part, starts: int) -> int:
        for _ in range(part.least):
            ends = self.after(part.choices[0], starts)
            if ends == starts:  # also if there are none
                break
            starts = ends
        reached = new = starts
        times: float = part.least
        while new and times < part.most:
            new = self.after(part.choices[0], new) & ~reached
            reached |= new
            times += 1
        return reached


def _parsed(expression: str) -> _Name | _Expression:
    name = _NAME.fullmatch(expression)
    return (
        _parsed_wholly(expression)
        if name is None
        else _Name(re.sub(r"\\(.)", r"\1", name[1], flags=re.DOTALL), bool(name[2]))
    )


@functools.lru_cache(_KNOWN)
def _parsed_wholly(expression: str) -> _Expression:
    try:
        parsed = _parser.parse(expression)
        whole = _compiler.compile(parsed)
        parts = tuple(_parts(parsed, parsed.state, whole.flags))
        if max((part.depth for part in parts), default=0) > _DEEPEST:
            raise RecursionError
        return _Expression.of(expression, whole, parts, "" if whole.flags & re.IGNORECASE else _beginning(parsed))
    except (re.error, OverflowError) as error:
        raise ValueError(f"{shown(expression)} is not a regular expression: {error}") from error
    except RecursionError:
        raise ValueError(f"{shown(expression)} is nested too deeply for a regular expression") from None


def _beginning(parsed: Iterable[Any]) -> str:
    """The letters before the first part that is no letter, nor the start of a name."""
    letters = []
    for kind, value in parsed:
        if str(kind) == "LITERAL":
            letters.append(chr(value))
        elif (str(kind), str(value)) != ("AT", "AT_BEGINNING"):
            break
    return "".join(letters)


def _parts(parsed: Any, state: Any, flags: int) -> Iterator[_Part]:
    """Yields the parts of what Python's parser made of an expression. Characters in a row are one."""
    row: list[Any] = []

    def characters() -> Iterator[_Part]:
        if row:
            yield _Part("character", pattern=_compiler.compile(_parser.SubPattern(state, [*row]), flags))
            row.clear()

    for kind, value in parsed:
        name = str(kind)
        if name not in _STRUCTURE:
            row.append((kind, value))
            continue
        yield from characters()
        if name == "BRANCH":
            yield _Part("any of", tuple(tuple(_parts(choice, state, flags)) for choice in value[1]))
        elif name == "SUBPATTERN":
            _, add, remove, inner = value
            yield _Part("any of", (tuple(_parts(inner, state, (flags | add) & ~remove)),))
        elif name in _REPEATS:
            least, most, inner = value
            most = math.inf if most is _parser.MAXREPEAT else most
            yield _Part("repeat", (tuple(_parts(inner, state, flags)),), least, most)
        elif name in _LOOKS:
            direction, inner = value
            width, choices = inner.getwidth()[0], (tuple(_parts(inner, state, flags)),)
            yield _Part("ahead" if direction > 0 else "behind", choices, width, absent=name == "ASSERT_NOT")
        else:
            raise re.error("groups that are referred to, or that do not backtrack, are not supported")
    yield from characters()


def _bits(positions: int) -> Iterator[int]:
    while positions:
        lowest = positions & -positions
        yield lowest.bit_length() - 1
        positions ^= lowest
