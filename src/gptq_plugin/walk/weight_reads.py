"""Finds layers whose weight the model reads without calling the layer; they cannot be replaced.

Mamba's fused kernels take the weights of projections, and RWKV rescales some of its weights. Such a layer may be called
as well, like any other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


class WeightReads:
    """Watches one forward.

    Args:
        model: The model that runs.
        layers: Some of its modules, by name.

    Attributes:
        names: The layers whose weight was an argument of a function called outside the modules it belongs to (a tied
            weight belongs to several).
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._model = model
        self._layers = layers
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
            for module in self._model.modules():
                # Before all other hooks, which may read the weight too.
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            stack.enter_context(_Arguments(self))
            yield

    def read(self, parameter: nn.Parameter) -> None:
        """Called when a function gets this parameter."""
        if any(parameter is one for module in self._inside.modules for one in module._parameters.values()):
            return
        for name, module in self._layers.items():
            if module._parameters.get("weight") is parameter:
                self.names.add(name)


class _Inside(threading.local):
    """The modules that this thread is in the forward of, the outermost first."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []


class _Arguments(TorchFunctionMode):
    """Reports every parameter that is an argument of a torch function."""

    def __init__(self, reads: WeightReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", None) != "__get__":  # dtype and shape, which a QuantLinear has too
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, nn.Parameter):
                    self._reads.read(value)
        return function(*args, **(kwargs or {}))
