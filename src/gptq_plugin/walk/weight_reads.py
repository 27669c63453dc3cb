"""Finds layers whose weight is read without calling the layer; they cannot be replaced.

Mamba's fused kernels take the weights of projections, and RWKV rescales some of its weights. Such a layer may be called
as well, like any other. A hook on the layer that reads its weight goes on after the layer is replaced, and would read
another.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptq_plugin.device.modules import modules_of


class WeightReads:
    """Watches one forward.

    To be made before other hooks than the user's are registered: those are told apart by that.

    Args:
        model: The model that runs.
        layers: Some of its modules, by name; none that are made of experts' parameters.

    Attributes:
        names: The layers whose weight, or a view of it, was an argument of a function called outside the forwards of
            the modules it belongs to (a tied weight belongs to several).
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._model = model
        self._layers = layers
        self._hooks = [
            (hooks, list(hooks))
            for layer in layers.values()
            for hooks in (layer._forward_pre_hooks, layer._forward_hooks)
        ]
        self._inside = _Inside()
        self.names: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """To be entered on the thread that runs the forward."""

        def enter(module: nn.Module, *_: Any) -> None:
            self._inside.modules.append(module)

        def leave(*_: Any) -> None:
            self._inside.modules.pop()

        with contextlib.ExitStack() as stack:
            for hooks, keys in self._hooks:
                stack.enter_context(_wrapped(hooks, keys, self._outside))
            for module in modules_of(self._model).values():
                if getattr(type(module), "keeps_nothing", False):  # a layer of an expert, which nobody else can read
                    continue
                # Before all other hooks, which may read the weight too: ours bring it to the device.
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            stack.enter_context(_Arguments(self))
            yield

    def read(self, parameter: nn.Parameter) -> None:
        """Called when a function gets this parameter; counts unless a module that holds it is running."""
        if any(parameter is one for module in self._inside.modules for one in module._parameters.values()):
            return
        for name, module in self._layers.items():
            if module._parameters.get("weight") is parameter:
                self.names.add(name)

    def _outside(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The user's hook on a layer, during which the layer's forward is not running."""

        @functools.wraps(hook)
        def run(module: nn.Module, *args: Any) -> Any:
            inside = self._inside.modules
            own = inside.pop()
            try:
                return hook(module, *args)
            finally:
                inside.append(own)

        return run


class _Inside(threading.local):
    """The modules that this thread is in the forward of, the outermost first."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []


@contextlib.contextmanager
def _wrapped(
    hooks: dict[int, Any], keys: Iterable[int], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Wraps some hooks inside the block; those that are removed meanwhile stay removed."""
    own = {key: hooks[key] for key in keys if key in hooks}
    hooks.update({key: wrap(hook) for key, hook in own.items()})
    try:
        yield
    finally:
        hooks.update({key: hook for key, hook in own.items() if key in hooks})


class _Arguments(TorchFunctionMode):
    """Reports every parameter that is an argument of a torch function, by itself or in a list."""

    def __init__(self, reads: WeightReads) -> None:
        super().__init__()
        self._reads = reads
        self._views: dict[int, tuple[Tensor, nn.Parameter]] = {}  # by id: what a property gave of a parameter

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        parameters = list(self._parameters((*args, *(kwargs or {}).values())))
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", None) != "__get__":
            for parameter in parameters:
                self._reads.read(parameter)
        elif parameters and isinstance(result, Tensor):
            # data or T; dtype and shape a QuantLinear has too
            self._views[id(result)] = result, parameters[0]
        return result

    def _parameters(self, values: Iterable[Any]) -> Iterator[nn.Parameter]:
        for value in values:
            if isinstance(value, (list, tuple)):
                yield from self._parameters(value)
            elif isinstance(value, nn.Parameter):
                yield value
            elif id(value) in self._views:
                yield self._views[id(value)][1]
