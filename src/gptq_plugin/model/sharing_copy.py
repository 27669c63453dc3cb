"""A copy of a module tree that shares only the memory of the parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copies modules, buffers and configuration; the copy's parameters lie in the same memory.

    A module's forward that was replaced on the instance (as TRL and accelerate do) is replaced in the copy too, and
    calls the copy wherever it called the original.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    for module in model.modules():
        # A hook may hold anything, even a Trainer: it is not copied.
        memo.update({id(hook): hook for kind in _HOOKS for hook in getattr(module, kind).values()})
        if module._compiled_call_impl is not None:  # bound to the original
            memo[id(module._compiled_call_impl)] = None
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if "forward" in module.__dict__:
            module.__dict__["forward"] = _rebound(module.__dict__["forward"], memo)
    return copied


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A callable, or a value that one holds, with copies in place of their originals; deepcopy does not copy functions.

    Args:
        value: A function, a bound method, another callable object with its attributes, or any other value.
        copies: Copies by the id of their originals; visited values are added.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, nn.Module) or not callable(value):
        return value
    copies[id(value)] = value
    if isinstance(value, MethodType):
        copies[id(value)] = MethodType(_rebound(value.__func__, copies), _rebound(value.__self__, copies))
        return copies[id(value)]
    held = _held(value)
    rebound = {name: _rebound(content, copies) for name, content in held.items()}
    if any(rebound[name] is not content for name, content in held.items()):
        copies[id(value)] = _holding(value, rebound)
    return copies[id(value)]


def _held(value: Any) -> Mapping[str, Any]:
    """Values that a callable holds: a function's closure, or an object's attributes."""
    if not isinstance(value, FunctionType):
        return {} if isinstance(value, type) else getattr(value, "__dict__", {})
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != CellType()}


def _holding(value: Any, held: Mapping[str, Any]) -> Any:
    """A copy of a callable that holds other values."""
    if not isinstance(value, FunctionType):
        other = copy.copy(value)
        other.__dict__.update(held)
        return other
    cells = tuple(CellType(held[name]) if name in held else CellType() for name in value.__code__.co_freevars)
    function = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    function.__kwdefaults__ = value.__kwdefaults__
    function.__dict__.update(value.__dict__)
    return function
