"""A copy of a module tree that shares only the memory of the parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copies modules, buffers and configuration; the copy's parameters lie in the same memory.

    A module's forward that was replaced on the instance (as TRL and accelerate do) is replaced in the copy too, and
    calls the copy wherever it called the original.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    for module in model.modules():
        memo.update({id(value): value.detach().clone() for value in _computed(vars(module), set())})
        # A hook may hold anything, even a Trainer: it is not copied.
        memo.update({id(hook): hook for kind in _HOOKS for hook in getattr(module, kind).values()})
        if module._compiled_call_impl is not None:  # bound to the original
            memo[id(module._compiled_call_impl)] = None
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if "forward" in module.__dict__:
            module.__dict__["forward"] = _rebound(module.__dict__["forward"], memo)
    return copied


def _computed(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in nested containers that were computed from parameters, which deepcopy refuses: PEFT keeps such for tied
    adapters."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for one in value.values() if isinstance(value, dict) else value:
            yield from _computed(one, seen)


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A callable, or a value that one holds, with copies in place of their originals; deepcopy does not copy functions.

    Args:
        value: A function, a bound method, another callable object with its attributes, or any other value.
        copies: Copies by the id of their originals; visited values are added.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, (nn.Module, type)) or not callable(value):
        return value
    if isinstance(value, MethodType):
        bound = MethodType(_rebound(value.__func__, copies), _rebound(value.__self__, copies))
        return copies.setdefault(id(value), bound)
    if isinstance(value, FunctionType):
        return _rebound_function(value, copies)
    if not _leads_to_copies(value, copies, set()):
        return copies.setdefault(id(value), value)
    if isinstance(value, functools.partial):
        parts = [_rebound(part, copies) for part in value.args]
        keywords = {name: _rebound(held, copies) for name, held in value.keywords.items()}
        copies[id(value)] = functools.partial(_rebound(value.func, copies), *parts, **keywords)
    else:
        copies[id(value)] = copy.copy(value)
    # Known before what it holds is visited: that may hold it too.
    copies[id(value)].__dict__.update({name: _rebound(held, copies) for name, held in vars(value).items()})
    return copies[id(value)]


def _rebound_function(function: FunctionType, copies: dict[int, Any]) -> FunctionType:
    """A function whose closure and defaults hold copies; itself if they hold nothing that was copied."""
    if not _leads_to_copies(function, copies, set()):
        copies[id(function)] = function
        return function
    cells = tuple(CellType() for _ in function.__closure__ or ())
    other = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    copies[id(function)] = other  # known before what it holds is visited: a function that calls itself holds itself
    for cell, own in zip(cells, function.__closure__ or (), strict=True):
        if own != CellType():
            cell.cell_contents = _rebound(own.cell_contents, copies)
    if function.__defaults__ is not None:
        other.__defaults__ = tuple(_rebound(held, copies) for held in function.__defaults__)
    if function.__kwdefaults__ is not None:
        other.__kwdefaults__ = {name: _rebound(held, copies) for name, held in function.__kwdefaults__.items()}
    other.__dict__.update({name: _rebound(held, copies) for name, held in vars(function).items()})
    return other


def _leads_to_copies(value: Any, copies: Mapping[int, Any], seen: set[int]) -> bool:
    """True if a callable holds, directly or through others, something that has another copy."""
    if id(value) in copies:
        return copies[id(value)] is not value
    if id(value) in seen or isinstance(value, (nn.Module, type)) or not callable(value):
        return False
    seen.add(id(value))
    return any(_leads_to_copies(held, copies, seen) for held in _held(value))


def _held(value: Any) -> Iterator[Any]:
    """Values that a callable holds: a closure and defaults, a partial's arguments, an object's attributes."""
    if isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
        return
    if isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    yield from getattr(value, "__dict__", {}).values()
