"""Names that are no field of a dataclass are answered with the nearest field.

Tested by tests/test_config.py: as arguments of a configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable
from typing import Any, TypeVar

_Options = TypeVar("_Options")


def naming_the_nearest(options: type[_Options]) -> type[_Options]:
    """Has a dataclass answer an argument that it does not have with the nearest field."""
    init = options.__init__

    @functools.wraps(init)
    def checked(self: _Options, *args: Any, **given: Any) -> None:
        unknown = unknown_option(options, given)
        if unknown:
            raise TypeError(unknown)
        init(self, *args, **given)

    setattr(options, "__init__", checked)  # noqa: B010  for mypy
    return options


def unknown_option(options: type, values: Iterable[Any]) -> str:
    """A sentence for the first name that is no field, with the nearest one; empty if all are."""
    known = [f.name for f in dataclasses.fields(options)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return f"unknown option {name!r}: {hint}{options.__name__} has {', '.join(known)}"
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
