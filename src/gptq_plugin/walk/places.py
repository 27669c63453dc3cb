"""Places outside its local variables to which the forward of a model can write: `Place`."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from gptq_plugin.device.modules import modules_of


class _Missing:
    def __deepcopy__(self, memo: object) -> _Missing:
        return self

    def __repr__(self) -> str:
        return "nothing"


MISSING: Any = _Missing()


class Place:
    """An item of a dictionary of attributes or globals, a closure's cell, or an attribute of a class.

    Args:
        holder: The dictionary, cell or class.
        key: The item's or attribute's name.
        name: Of the holder, for messages.
        is_buffer: True for a buffer of a module.
    """

    def __init__(self, holder: Any, key: str, name: str, is_buffer: bool = False) -> None:
        self.holder, self.key, self.is_buffer = holder, key, is_buffer
        self._name = f"{name}.{key}"

    def get(self) -> Any:
        """The value there, or MISSING."""
        if isinstance(self.holder, types.CellType):
            try:
                return self.holder.cell_contents
            except ValueError:
                return MISSING
        items = vars(self.holder) if isinstance(self.holder, type) else self.holder
        return items.get(self.key, MISSING)

    def put(self, value: Any) -> None:
        """Puts a value there, or takes it away."""
        if value is self.get():
            return
        if isinstance(self.holder, types.CellType):
            if value is MISSING:
                del self.holder.cell_contents
            else:
                self.holder.cell_contents = value
        elif isinstance(self.holder, type):
            if value is MISSING:
                delattr(self.holder, self.key)
            else:
                setattr(self.holder, self.key, value)
        elif value is MISSING:
            del self.holder[self.key]
        else:
            self.holder[self.key] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self.holder is other.holder and self.key == other.key

    def __hash__(self) -> int:
        return hash((id(self.holder), self.key))

    def __str__(self) -> str:
        return self._name


def own_classes(model: nn.Module) -> list[type]:
    """The classes of the model's modules and their bases, without PyTorch's, whose forwards keep nothing on them."""
    classes = dict.fromkeys(kind for module in modules_of(model).values() for kind in type(module).__mro__)
    return [kind for kind in classes if kind is not object and kind.__module__.split(".")[0] != "torch"]


def variables(model: nn.Module) -> Iterator[Place]:
    """Global and closure variables that methods of the model's own classes refer to.

    Functions of the same Python module that they call are followed.
    """
    functions: list[Any] = [
        vars(module)["forward"] for module in modules_of(model).values() if "forward" in vars(module)
    ]
    for kind in own_classes(model):
        functions += [getattr(value, "fget", value) for value in vars(kind).values()]  # of a property, its getter
    yield from _variables(functions)


def is_data(value: Any) -> bool:
    """False for what code is made of: functions, classes, descriptors, Python modules."""
    return not (callable(value) or isinstance(value, types.ModuleType) or hasattr(type(value), "__get__"))


def _variables(functions: list[Any]) -> Iterator[Place]:
    seen: set[int] = set()
    while functions:
        function = functions.pop()
        function = getattr(function, "__func__", function)  # of a method, a static method
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        code, names = function.__code__, function.__globals__
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            place = Place(cell, key, function.__qualname__)
            if is_data(place.get()):
                yield place
            else:
                functions.append(place.get())  # of a decorator
        for key in _referred(code) & names.keys():
            value = names[key]
            if is_data(value):
                yield Place(names, key, function.__module__)
            elif getattr(value, "__globals__", None) is names:
                functions.append(value)


def _referred(code: types.CodeType) -> set[str]:
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return {*code.co_names, *(name for one in inner for name in _referred(one))}
