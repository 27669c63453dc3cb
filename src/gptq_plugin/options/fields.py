"""What a field may be: every option of configurations, quantizers and callbacks is checked here, by type and range.

A refusal names the field, tells what is allowed, and shows the value. Types count: ``True`` is no 1, and 1 is no
``True``.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST = 120  # letters of a value in a message
_MOST = 1000  # values in one that is shown
LARGEST = 2**31 - 1  # of counts and sizes


@dataclass(frozen=True)
class Kind:
    """Values that a field may have.

    Attributes:
        words: What they are, as in "must be an integer from 1 to 8".
        accepts: Called on any value at all.
    """

    words: str
    accepts: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError, with `name` and `value`, if the value is of another kind, or cannot be asked."""
        try:
            accepted, cause = self.accepts(value), None
        except Exception as error:  # noqa: BLE001  any object of a user
            accepted, cause = False, error
        if not accepted:
            raise ValueError(f"{name} must be {self.words}; got {shown(value)}") from cause


def shown(value: Any) -> str:
    """A value in a message: cut, and by its type alone where it cannot be shown, or holds more than a person reads."""
    try:
        if _is_large(value):
            return f"<{type(value).__name__} of {len(value)}>"
        text = repr(value)
    except Exception:  # noqa: BLE001  any object of a user
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({type(value).__name__})"


def _is_large(value: Any) -> bool:
    """True for a collection of very many values, itself or in those inside, which may be there many times."""
    waiting, seen = [value], 0
    while waiting and seen <= _MOST:
        one = waiting.pop()
        seen += 1
        if isinstance(one, Mapping):
            waiting += itertools.islice((part for item in one.items() for part in item), _MOST)
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += itertools.islice(one, _MOST)
    return seen > _MOST


def is_number(value: Any) -> bool:
    """True for an int or a float, NaN included; bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """True for an int; bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(*choices: Any) -> Kind:
    """One of these values, of its type."""
    words = f"one of {', '.join(map(repr, choices))}"
    return Kind(words, lambda value: any(type(value) is type(choice) and value == choice for choice in choices))


def integer(least: int, most: int = LARGEST, *, also: int | None = None) -> Kind:
    """An integer in a range, or the one beside it."""
    words = "a positive integer" if (least, most) == (1, LARGEST) else f"an integer from {least} to {most}"
    if most == LARGEST:
        words += f", at most {most}" if least == 1 else ""
    words = words if also is None else f"{also} or {words}"
    return Kind(words, lambda value: is_integer(value) and (value == also or least <= value <= most))


def share(*, least: float = 0.0) -> Kind:
    """A number in [least, 1)."""
    return Kind(f"a number in [{least:g}, 1)", lambda value: is_number(value) and least <= value < 1)


def between(least: float, most: float) -> Kind:
    """A number in [least, most]."""
    return Kind(f"a number from {least:g} to {most:g}", lambda value: is_number(value) and least <= value <= most)


def above(bound: float) -> Kind:
    """A finite number above a bound."""
    return Kind(
        f"a number above {bound:g}",
        lambda value: is_number(value) and value > bound and (isinstance(value, int) or math.isfinite(value)),
    )


def optional(kind: Kind, none: str) -> Kind:
    """That kind, or None, which has a meaning."""
    return Kind(f"{kind.words}, or None ({none})", lambda value: value is None or kind.accepts(value))


def list_of(kind: Kind, words: str, least: int = 0, most: int = 10**6) -> Kind:
    """A list or tuple of values of a kind; a text is none, though it has letters."""

    def accepts(value: Any) -> bool:
        return is_list(value) and least <= len(value) <= most and all(kind.accepts(one) for one in value)

    return Kind(words, accepts)


def is_list(value: Any) -> bool:
    """True for lists, tuples and what is like them (OmegaConf's), not for texts and bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview, range))


def of_type(words: str, *types: type) -> Kind:
    """An object of one of these classes."""
    return Kind(words, lambda value: isinstance(value, types))


SWITCH = one_of(True, False)
TEXT = of_type("a text", str)
NAME = Kind("a text that is not empty", lambda value: isinstance(value, str) and bool(value))
FUNCTION = Kind("a function, or another object that can be called", callable)


def function_of(count: int) -> Kind:
    """Functions that take so many values in a row, as far as their signature is known."""
    return Kind(
        f"a function that takes {count} values in a row", lambda value: FUNCTION.accepts(value) and _takes(value, count)
    )


def _takes(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some functions in C have none
        return True
    return True


PATH = Kind("a path", lambda value: isinstance(value, (str, os.PathLike)) and bool(_path(value)))
FOLDER = Kind(
    "a path, in UTF-8, with names of at most 255 bytes", lambda value: PATH.accepts(value) and _is_plain(value)
)
MAPPING = of_type("a mapping", Mapping)


def _is_plain(value: Any) -> bool:
    path = _path(value).encode()  # raises where it cannot be
    return b"\0" not in path and len(path) < 4000 and all(len(name) <= 255 for name in path.split(b"/"))


def _path(value: Any) -> str:
    path = os.fspath(value)
    return path if isinstance(path, str) else ""
