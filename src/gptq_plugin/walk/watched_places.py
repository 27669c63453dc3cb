"""What a forward has written outside its local variables: `WatchedPlaces`.

It can keep something in an attribute, a buffer or a submodule of a module, on a class, in a global or closure variable,
or inside an object that one of these refers to. Rebinding is seen by identity, a change of a container by its items,
and a change of a tensor by its version.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.device.modules import modules_of
from gptq_plugin.walk.places import MISSING, Place, is_data, own_classes, variables

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes where forwards keep nothing of a batch
_LIMIT = 300  # objects behind one place; a larger graph (a trainer, a data set) belongs to others
_SMALL = 2**20  # bytes up to which the copy of a tensor stays on its device


class WatchedPlaces:
    """Every place that the forward of a model can write to, as it is now.

    Args:
        model: Any module. Of modules that are not its own, such as experts that were taken apart, the class may tell
            that forwards keep nothing on them: `keeps_nothing`.
        is_lent: True for a tensor that others than the forward have put in the place of a buffer.
    """

    def __init__(self, model: nn.Module, is_lent: Callable[[Tensor], bool]) -> None:
        self._is_lent = is_lent
        modules = modules_of(model)
        self._modules = {id(module) for module in modules.values()}
        self._buffers = {id(module._buffers) for module in modules.values()}
        holders: list[tuple[Any, Any, str]] = [
            (items, items, name)
            for name, module in modules.items()
            if not getattr(type(module), "keeps_nothing", False)
            for items in (vars(module), module._buffers, module._modules)
        ]
        holders += [(kind, vars(kind), kind.__qualname__) for kind in own_classes(model)]
        self._attributes = [(holder, items, dict(items), name) for holder, items, name in holders]
        self._as_they_were = _Identities([items for _, items, _ in holders])
        self._variables = {place: place.get() for place in variables(model)}
        self._behind: dict[int, tuple[_Contents | _Bytes, dict[Place, None]]] = {}  # places refer to it; by id
        reached: dict[int, list[Any]] = {}  # by id of a place's value
        for place, value in self._initial():
            if id(value) not in reached:
                reached[id(value)] = self._reached_from(value)
            for part in reached[id(value)]:
                if id(part) not in self._behind:
                    self._behind[id(part)] = (_Bytes if isinstance(part, Tensor) else _Contents)(part), {}
                self._behind[id(part)][1][place] = None

    def written(self) -> dict[Place, Any]:
        """The places that hold something else now, or something that has changed; and what they held, or MISSING.

        What has changed itself gets its contents back by `restore`.
        """
        found = dict(self._rebound())
        changed = {place for one, places in self._behind.values() if one.has_changed() for place in places}
        if changed:
            found |= {place: value for place, value in self._initial() if place in changed}
        return found

    def restore(self) -> None:
        """Puts everything back."""
        for place, value in self._rebound():
            place.put(value)
        for one, _ in self._behind.values():
            if one.has_changed():
                one.restore()

    def _initial(self) -> Iterator[tuple[Place, Any]]:
        for holder, _, saved, name in self._attributes:
            yield from ((self._place(holder, key, name), saved[key]) for key in saved if _is_watched(key))
        yield from self._variables.items()

    def _rebound(self) -> Iterator[tuple[Place, Any]]:
        for holder, items, saved, name in [] if self._as_they_were.hold() else self._attributes:
            if len(items) == len(saved) and all(map(is_, items.values(), saved.values())):
                continue
            for key in filter(_is_watched, items.keys() | saved.keys()):
                value, held = items.get(key, MISSING), saved.get(key, MISSING)
                place = self._place(holder, key, name)
                if value is held or (place.is_buffer and isinstance(value, Tensor) and self._is_lent(value)):
                    continue
                yield place, held
        yield from ((place, held) for place, held in self._variables.items() if place.get() is not held)

    def _place(self, holder: Any, key: str, name: str) -> Place:
        return Place(holder, key, name, is_buffer=id(holder) in self._buffers)

    def _reached_from(self, value: Any) -> list[Any]:
        """Containers, objects and tensors behind a value; none where they lead back to the model, or are too many."""
        found: dict[int, Any] = {}
        left = [value]
        while left:
            one = left.pop()
            if id(one) in self._modules or len(found) > _LIMIT:
                return []  # what holds the model is outside of it
            parts = _parts(one)
            if id(one) not in found and (parts is not None or _has_version(one)):
                found[id(one)] = one
                left += parts or []
        return list(found.values())


class _Identities:
    """What many mappings hold, compared without a step in Python for each: a forward is stopped often to ask.

    Args:
        mappings: Their values are kept alive.
    """

    def __init__(self, mappings: Sequence[Mapping[str, Any]]) -> None:
        self._empty = [one for one in mappings if not one]
        self._filled = [one for one in mappings if one]
        self._sizes = list(map(len, self._filled))
        self._values = list(self._held())

    def hold(self) -> bool:
        """True while all hold the very same values."""
        return (
            not any(self._empty)
            and list(map(len, self._filled)) == self._sizes
            and all(map(is_, self._held(), self._values))
        )

    def _held(self) -> Iterator[Any]:
        return chain.from_iterable(one.values() for one in self._filled)


def _is_watched(key: str) -> bool:
    return key not in _OF_EVERY_MODULE and not key.startswith("__")


class _Contents:
    """What a container or object holds."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._held = [(view, list(view)) for view in _views(value)]
        self._slots = {name: getattr(value, name, MISSING) for name in _slots(type(value))}
        self._items = copy.copy(value) if isinstance(value, (dict, list, set, deque)) else None
        self._attributes = dict(vars(value)) if hasattr(value, "__dict__") else {}

    def has_changed(self) -> bool:
        return any(len(view) != len(held) or not all(map(is_, view, held)) for view, held in self._held) or any(
            getattr(self._value, name, MISSING) is not held for name, held in self._slots.items()
        )

    def restore(self) -> None:
        if self._items is not None:
            self._value.clear()
            (self._value.extend if isinstance(self._items, (list, deque)) else self._value.update)(self._items)
        if self._attributes or hasattr(self._value, "__dict__"):
            vars(self._value).clear()
            vars(self._value).update(self._attributes)
        for name, held in self._slots.items():
            if held is not MISSING:
                setattr(self._value, name, held)
            elif hasattr(self._value, name):
                delattr(self._value, name)


class _Bytes:
    """The values of a tensor."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._version = value._version
        self._copy = value.detach().clone() if value.nbytes <= _SMALL else value.detach().to("cpu", copy=True)

    def has_changed(self) -> bool:
        return bool(self._value._version != self._version)

    @torch.no_grad()
    def restore(self) -> None:
        self._value.copy_(self._copy)
        self._version = self._value._version


def _has_version(value: Any) -> bool:
    """True for a tensor in which a change can be seen and undone; weights are not exchanged."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and not (value.is_inference() or value.is_meta)
        and value.layout is torch.strided
    )


def _parts(value: Any) -> list[Any] | None:
    """Items and attributes of a container or an object; None for anything else."""
    if isinstance(value, _ATOMS) or not is_data(value):
        return None
    slots = _slots(type(value))
    if not slots and not isinstance(value, _CONTAINERS) and not hasattr(value, "__dict__"):
        return None
    of_slots = [getattr(value, name) for name in slots if hasattr(value, name)]
    return [*(part for view in _views(value) for part in view), *of_slots]


_ATOMS = (Tensor, nn.Module, str, bytes, int, float, type(None))
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


def _views(value: Any) -> list[Any]:
    """What shows the items, and the attributes, as they are when it is read."""
    if isinstance(value, dict):
        views: list[Any] = [value.keys(), value.values()]
    else:
        views = [value] if isinstance(value, _CONTAINERS) else []
    return [*views, vars(value).values()] if hasattr(value, "__dict__") else views


def _slots(kind: type) -> tuple[str, ...]:
    declared = [vars(one).get("__slots__", ()) for one in kind.__mro__]
    names = [name for slots in declared for name in ([slots] if isinstance(slots, str) else slots)]
    return tuple(name for name in names if not name.startswith("__"))
