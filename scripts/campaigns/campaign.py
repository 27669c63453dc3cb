"""A campaign: seeded cases, and what is attempted with each. What an attempt may end in is decided here.

An attempt is ok, or refused by an error of this package that teaches; anything else is a fault: another exception, a
hang, memory, a process that dies, and what `Wrong` tells.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

OK, REFUSED, FAULT = "ok", "refused", "fault"

_LONGEST = 2000  # letters of a message
_REFUSALS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)

_Value = TypeVar("_Value")


class Wrong(Exception):
    """Something was done that must not be: wrong numbers, a file outside, something lost."""


class Refused(Exception):
    """A command ended with what it printed."""


class Outcome(NamedTuple):
    """Of one attempt: its name, "ok", "refused" or "fault", and the error's text."""

    attempt: str
    kind: str
    text: str = ""


@dataclass(frozen=True)
class Campaign:
    """What is attacked, and how.

    Attributes:
        about: What is attacked, for the table.
        cases, few: In the long run, and in the tests' short one.
        given: ``given(seed, count)``: what each case is made from. The first ones do not depend on the count.
        attack: ``attack(case, given)``, in a process of its own; calls ``case.attempt``.
        prepare: ``prepare(folder)``, once, before any case: what is slow is imported and made here. The folder stays.
        seconds: An attempt may take.
        memory: Bytes that an attempt may add to the process's address space; None for no limit.
    """

    about: str
    cases: int
    few: int
    given: Callable[[int, int], Iterable[Any]]
    attack: Callable[[Case, Any], None]
    prepare: Callable[[Path], None] = lambda folder: None
    seconds: float = 30
    memory: int | None = 2 << 30


def own_error(error: Exception) -> str:
    """Why this is no refusal; empty if it is one of this package's errors, or one of Python's that a ``raise`` of this
    package raised."""
    if type(error).__module__.startswith("gptq_plugin.") or isinstance(error, Refused):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    raised = frames and "/gptq_plugin/" in frames[-1].filename and (frames[-1].line or "").startswith("raise ")
    return "" if raised and isinstance(error, _REFUSALS) else "not ours"


def message_fault(message: str, longest: int = _LONGEST) -> str:
    """Why a message cannot be shown to a user; empty if it can."""
    if len(message) > longest:
        return f"a message of {len(message)} letters"
    try:
        message.encode()
    except UnicodeEncodeError:
        return "a message that cannot be printed"
    return ""


def names(*words: str) -> Callable[[Exception], str]:
    """Refusals that are this package's, can be shown, and have one of these words, such as the field's name."""

    def objection(error: Exception) -> str:
        message = str(error)
        fault = own_error(error) or message_fault(message)
        if fault:
            return fault
        return "" if any(word in message for word in words) else f"names none of {', '.join(words)[:200]}"

    return objection


class Case:
    """A case that runs.

    Args:
        folder: Its own, empty; removed afterwards.
        tell: Is given "what" with the description, "attempt" with a name, or "outcome" with an `Outcome`.
    """

    def __init__(self, folder: Path, tell: Callable[[str, Any], None]) -> None:
        self.folder = folder
        self._tell = tell

    def is_of(self, what: str) -> None:
        """Describes the case, for those who look for the fault."""
        self._tell("what", what)

    def attempt(
        self, name: str, run: Callable[[], _Value], objection: Callable[[Exception], str] = own_error
    ) -> _Value | None:
        """Runs it, and tells the outcome; the value if it is ok, None if not.

        Args:
            name: As "load"; the same in all cases.
            run: May raise `Wrong`.
            objection: Tells of an exception why it is no good refusal; empty if it is one.
        """
        self._tell("attempt", name)
        value, outcome = None, Outcome(name, OK)
        try:
            value = run()
        except Wrong as error:
            outcome = Outcome(name, FAULT, f"wrong: {error}")
        except Exception as error:  # noqa: BLE001  that is what it is for
            why = objection(error)
            outcome = Outcome(name, FAULT, f"{why}: {_trace(error)}") if why else Outcome(name, REFUSED, str(error))
        self._tell("outcome", outcome)
        return value


def _trace(error: Exception) -> str:
    """The error, where it came from, and the nearest line of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/gptq_plugin/" in frame.filename]
    where = [f"{frame.filename.rpartition('/gptq_plugin/')[2]}:{frame.lineno}" for frame in [*ours[-1:], *frames[-1:]]]
    return f"{type(error).__name__} at {' < '.join(dict.fromkeys(where))}: {str(error)[:600]}"
