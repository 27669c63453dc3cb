"""Names that no class takes as an argument are answered with the nearest that it takes.

Tested by tests/test_config.py: as arguments of a configuration, of a finish and of callbacks.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

_Options = TypeVar("_Options")


def naming_the_nearest(**others: Collection[str]) -> Callable[[type[_Options]], type[_Options]]:
    """Has a class answer an argument that it does not have with the nearest it has.

    Args:
        **others: By the names of other classes, arguments of theirs that users may look for here.
    """

    def decorate(options: type[_Options]) -> type[_Options]:
        init = options.__init__
        known = list(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def checked(self: _Options, *args: Any, **given: Any) -> None:
            unknown = unknown_name(options.__name__, known, given, others)
            if unknown:
                raise TypeError(unknown)
            init(self, *args, **given)

        setattr(options, "__init__", checked)  # noqa: B010  for mypy
        return options

    return decorate


def unknown_option(options: type, values: Iterable[Any], others: Mapping[str, Collection[str]] | None = None) -> str:
    """A sentence for the first name that is no field of a dataclass, with the nearest one; empty if all are.

    Args:
        options: The dataclass.
        values: The names.
        others: As for `naming_the_nearest`.
    """
    return unknown_name(options.__name__, [f.name for f in dataclasses.fields(options)], values, others or {})


def unknown_name(owner: str, known: Sequence[str], names: Iterable[Any], others: Mapping[str, Collection[str]]) -> str:
    """A sentence for the first name that `owner` does not have, with the nearest one; empty if it has all of them.

    A name that another class has is named as its, and so is one that is near to none here.
    """
    for name in names:
        if name not in known:
            near = _nearest(str(name), owner, known, others)
            hint = f"did you mean {near}? " if near else ""
            return f"unknown option {name!r}: {hint}{owner} has {', '.join(known)}"
    return ""


def _nearest(name: str, owner: str, known: Sequence[str], others: Mapping[str, Collection[str]]) -> str:
    """How the nearest option is written; empty if none is near."""
    for cutoff in (1.0, 0.6):  # difflib's own
        for other, options in ((owner, known), *others.items()):
            near = difflib.get_close_matches(name, options, n=1, cutoff=cutoff)
            if near:
                return repr(near[0]) if other == owner else f"{other}({near[0]}=...)"
    return ""


def field_defaults(options: type) -> dict[str, Any]:
    """The default of every field of a dataclass, by name; fields without one are left out."""
    found = {}
    for field in dataclasses.fields(options):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found
