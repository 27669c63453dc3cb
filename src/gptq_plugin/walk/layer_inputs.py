"""The inputs of layers: hooks that see every call, and a weak memory of which tensor it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


@contextlib.contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls visit(name, input) before every forward of a layer on a dense tensor while the context is open. Some others
    the layer itself refuses, and called with the rest it stays float (`model.judgement`).

    Args:
        layers: The layers by name.
        visit: Called on the thread of the forward. May suspend it.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter((*args, *kwargs.values())), None)
            if is_dense(x):
                visit(name, x)

        return before

    with contextlib.ExitStack() as hooks:
        for name, module in layers.items():
            hooks.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        yield


def is_dense(value: Any) -> TypeGuard[Tensor]:
    """True for a tensor that is not sparse, and whose rows are of one length."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided


class SeenInput:
    """A tensor a layer has read, remembered without keeping it alive.

    Identity holds only while the tensor lives: one at a reused address is another input, and so is one that was changed
    in place since.
    """

    def __init__(self, x: Tensor) -> None:
        self._ref = TensorWeakRef(x)
        self._version = _version(x)

    def is_same(self, x: Tensor) -> bool:
        return self._ref() is x and self._version == _version(x)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # inference tensors have no version
