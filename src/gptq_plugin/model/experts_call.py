"""The layers of all experts of one parameter in one call: `ExpertsCall`.

transformers sorts the rows of a batch by expert and multiplies them with a grouped product
(``experts_implementation="grouped_mm"``); the stand-in for the parameter passes that product on to here. Hooks on the
call see the rows of all experts at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from gptq_plugin.layers.expert_stack import ExpertStack
from gptq_plugin.layers.grouped_product import grouped_product, has_grouped_product
from gptq_plugin.layers.qlinear import output_dtype
from gptq_plugin.model import experts_served

_Places = tuple[list[dict[str, Any]], list[str]]


class ExpertsCall(nn.Module):
    """Called as call(x, ends), with the rows x, [rows, in], of expert e at ends[e - 1] up to ends[e].

    Args:
        layers: Returns an expert's layers, whose outputs are concatenated.
        experts: Number of experts.
        names: A module, and the names below it of each expert's layers, which are those that `layers` returns. Without,
            one product never serves quantized layers (`ExpertStack`).

    Attributes:
        count: Number of calls inside the last `as_one`.
    """

    def __init__(
        self,
        layers: Callable[[int], Sequence[nn.Module]],
        experts: int,
        names: tuple[nn.Module, Sequence[Sequence[str]]] | None = None,
    ) -> None:
        super().__init__()
        self._layers = layers
        self._experts = experts
        self._names = names
        self._served: tuple[ExpertStack | None, _Places, list[Any]] | None = None
        self.count = 0
        self._as_one: list[list[nn.Module]] | None = None  # each expert's layers, inside `as_one`
        self._apart = 0
        self._ends: Any = WeakTensorKeyDictionary()

    def __call__(self, x: Tensor, ends: Tensor) -> Tensor:
        if not self._forward_pre_hooks and not self._forward_hooks:  # nobody asks for the ends
            self.count += 1
            return self.forward(x, ends)
        self._ends[x] = ends
        self.count += 1
        result: Tensor = super().__call__(x, ends)
        return result

    def __reduce__(self) -> tuple[Callable[..., ExpertsCall], tuple[Any, ...]]:
        return _copied, (self._layers, self._experts, self._names)  # no call outlasts a copy

    def ends_of(self, x: Tensor) -> Tensor:
        """Where the experts' rows end, int32 [experts], in an input of this call that is alive."""
        ends: Tensor = self._ends[x]
        return ends

    @contextlib.contextmanager
    def as_one(self, but: int = 0) -> Iterator[None]:
        """Inside the block float layers are not called, only their weights used, so that hooks on them see nothing.

        Args:
            but: Of how many experts, the first ones, layers are called with their rows all the same.
        """
        self._as_one, self._apart, self.count = self._of_all(), but, 0
        try:
            yield
        finally:
            self._as_one = None

    def call_layers(self) -> None:
        """Calls float layers again for the rest of an `as_one`."""
        self._as_one = None

    def stack(self) -> bool:
        """Stacks quantized layers in memory for one product of all; False if that does not serve them."""
        self._served = None
        return ExpertStack.of_experts(self._of_all()) is not None  # type: ignore[arg-type]

    def _stack(self) -> ExpertStack | None:
        """The stack of the layers that are in place now."""
        if self._served is not None:
            stack, places, known = self._served
            if list(map(dict.get, *places)) == known:  # a few microseconds for hundreds of layers
                return stack
        places = ([], []) if self._names is None else _places(*self._names)
        known = list(map(dict.get, *places))
        stack = ExpertStack.having([layer for own in self._of_all() for layer in own]) if known else None
        self._served = stack, places, known
        return stack

    def _of_all(self) -> list[list[nn.Module]]:
        return [list(self._layers(expert)) for expert in range(self._experts)]

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Returns [rows, out]; rows that are no expert's are 0."""
        if self._as_one is None:
            stack = self._stack()
            y = None if stack is None else stack.of_all(x, ends)
            if y is not None:
                return y
            layers = self._of_all()
            return _one_by_one(x, ends, lambda expert, rows: _joined([layer(rows) for layer in layers[expert]]))
        with torch._C.DisableTorchFunction():  # modes that watch who reads a weight
            weights = [[_weight(layer) for layer in own] for own in self._as_one]
            dtype = output_dtype(x)
            if has_grouped_product(x.to(dtype), sum(map(len, weights[0]))):
                y = _grouped(x.to(dtype), ends, weights)
            else:
                y = _one_by_one(x, ends, lambda expert, rows: _products(rows, weights[expert]))
        start = 0
        for expert, stop in enumerate(ends[: self._apart].tolist() if self._apart else ()):
            if stop > start:
                y[start:stop] = _joined([layer(x[start:stop]) for layer in self._layers(expert)])
            start = stop
        return y


def _copied(*arguments: Any) -> ExpertsCall:
    """In a process that loads a whole module, whose configuration may name it, the implementation is not known yet."""
    experts_served.register()
    return ExpertsCall(*arguments)


def _places(module: nn.Module, names: Sequence[Sequence[str]]) -> _Places:
    """Where the modules on the way to each layer are looked up, and it at last: dicts and keys."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for name in (name for own in names for name in own):
        around = module
        for part in name.split("."):
            found[id(around), part] = around._modules, part
            around = around.get_submodule(part)
    return [there for there, _ in found.values()], [key for _, key in found.values()]


def _weight(layer: nn.Module) -> Tensor:
    weight = layer._parameters["weight"]  # as an attribute it takes three times as long
    assert weight is not None
    return weight


def _one_by_one(x: Tensor, ends: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Calls product(expert, its rows) for experts that have any, and for the first one if none has."""
    stops, start = ends.tolist(), 0
    parts: list[Tensor] = []
    for expert, stop in enumerate(stops):
        if stop > start or not (parts or expert or stops[-1]):
            parts.append(product(expert, x[start:stop]))
        start = stop
    if start < len(x):
        parts.append(parts[0].new_zeros(len(x) - start, parts[0].shape[1]))
    return torch.cat(parts)


def _products(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return _joined([functional.linear(rows, weight) for weight in weights])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def _grouped(x: Tensor, ends: Tensor, weights: Sequence[Sequence[Tensor]]) -> Tensor:
    parts = [weight for of_one in weights for weight in of_one]
    whole = _as_they_lie(parts, x.dtype)
    if whole is None:
        whole = torch.cat([weight.to(x.dtype) for weight in parts])
    return grouped_product(x, ends, whole.unflatten(0, (len(weights), -1)))


def _as_they_lie(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Matrices one below the other, [rows, in], without a copy; None unless they lie so in memory."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.dtype != dtype or part.data_ptr() != end or not part.is_contiguous():
            return None
        end += part.nbytes
    memory = first.untyped_storage()
    if memory.data_ptr() + memory.nbytes() < end:  # of others, that happen to be neighbours
        return None
    width = first.shape[1]  # a single row's stride may be anything
    return first.as_strided((sum(map(len, parts)), width), (width, 1))
