"""What code without a version reaches by name: `Reached`.

Tested by tests/cache/test_fingerprint.py: in the fingerprints of functions and classes.
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from gptq_plugin.cache.versions import TRAINERS, is_versioned, package_of

_ROOTS = frozenset(  # methods of modules that are called without being named by another
    {
        "forward",
        "calibration_step",
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
    }
)


def bytecode(code: types.CodeType) -> str:
    """A digest of what a function does, without where it stands."""
    hashed = hashlib.sha256(code.co_code)
    hashed.update(repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)).encode())
    for constant in code.co_consts:
        hashed.update(_constant(constant).encode())
    return hashed.hexdigest()


class Reached:
    """Follows functions and classes to the globals, attributes of Python modules, and methods whose names they use.

    A method counts if its name is used anywhere, since the class of an object is not known before the code runs; so do
    those that stand in for a package's own, which its code calls.

    Args:
        take_in: Takes in a value that was reached.
    """

    def __init__(self, take_in: Callable[[Any], None]) -> None:
        self._take_in = take_in
        self._names: set[str] = set(_ROOTS)
        self._classes: dict[type, set[str]] = {}  # with the names of theirs that were followed
        self._functions: list[types.FunctionType] = []

    def function(self, function: types.FunctionType) -> None:
        """Notes a function to follow."""
        self._functions.append(function)

    def class_(self, kind: type) -> None:
        """Notes a class, whose methods are followed once their names are used."""
        self._classes.setdefault(kind, set())

    def follow(self) -> None:
        """Takes in all that is reached from what was noted, until nothing is new."""
        while True:
            while self._functions:
                self._globals(self._functions.pop(0))
            used = list(self._used())
            if not used:
                return
            for kind, name in used:
                self._classes[kind].add(name)
                self._take_in((name, vars(kind)[name]))

    def _used(self) -> Iterator[tuple[type, str]]:
        for kind, done in self._classes.items():
            for name, value in sorted(vars(kind).items(), key=lambda item: item[0]):
                used = name in self._names or _is_operator(kind, name, value) or _overrides(kind, name, value)
                if used and name not in done:
                    yield kind, name

    def _globals(self, function: types.FunctionType) -> None:
        names = _names(function.__code__)
        self._names |= names
        known = function.__globals__
        for name in sorted(_global_names(function.__code__)):
            if name in known:
                self._take_in((name, known[name]))
                self._attributes(known[name], names, set())
            elif not hasattr(builtins, name):
                self._take_in((name, "no global"))

    def _attributes(self, module: Any, names: set[str], seen: set[str]) -> None:
        """Takes in what has one of the names in a Python module, and in those that it leads to."""
        if isinstance(module, types.ModuleType) and not is_versioned(module.__name__) and module.__name__ not in seen:
            seen.add(module.__name__)
            for attribute in sorted(names & vars(module).keys()):
                self._take_in((attribute, vars(module)[attribute]))
                self._attributes(vars(module)[attribute], names, seen)


def _is_operator(kind: type, name: str, value: Any) -> bool:
    """True for methods that Python calls by itself. Modules are made before they run."""
    made = name in ("__init__", "__new__") and issubclass(kind, nn.Module)
    return name.startswith("__") and isinstance(value, types.FunctionType) and not made


def _overrides(kind: type, name: str, value: Any) -> bool:
    """True for methods in the place of a package's own. Those of `nn.Module` are known (`_ROOTS`)."""
    own = (base for base in kind.__mro__[1:] if is_versioned(base.__module__) and base not in (nn.Module, object))
    takes = any(name in vars(base) for base in own if package_of(base.__module__) not in TRAINERS)
    return takes and isinstance(value, types.FunctionType) and not name.startswith("__")


def _names(code: types.CodeType) -> set[str]:
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return {*code.co_names, *(name for one in inner for name in _names(one))}


def _global_names(code: types.CodeType) -> set[str]:
    """Those of `_names` that are looked up as globals: `x.data` reads no global of the name `data`."""
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    own = {one.argval for one in dis.get_instructions(code) if "GLOBAL" in one.opname or one.opname == "LOAD_NAME"}
    return own.union(*map(_global_names, inner))


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return bytecode(value)
    if isinstance(value, frozenset):
        return f"frozenset {sorted(map(_constant, value))}"
    if isinstance(value, tuple):
        return f"tuple {[_constant(one) for one in value]}"
    return f"{type(value).__name__} {value!r} "
