"""Layers that their module calls with one input, and that share one product: `Siblings`."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptq_plugin.layers.product_function import not_a_view, product
from gptq_plugin.layers.stacked_weight import StackedWeight, difference, joined_bias
from gptq_plugin.layers.stored_weight import StoredWeight, exchanging
from gptq_plugin.layers.traced_part import make_traceable, traced_part

log = logging.getLogger(__name__)


class Siblings:
    """A group of layers whose weights are stacked in memory.

    While their module computes, the first of them that is called computes the outputs of all, and the others hand out
    theirs if they are given the very same tensor, unchanged. Everything else a layer computes by itself: what is called
    with another input, outside of the module's call, with gradients on, or with a tensor of inference mode, which does
    not count its changes; what `torch.export` traces; and all of it once another tensor is in a layer's place. Where
    `torch.compile` traces, the layers that are traced with one tensor share a product likewise.

    Layers that were taken out of the kernels' layout (moved, loaded anew, read) are stacked again when all are back in
    it. A copy of the module has a group of its own; a copy of one layer has none.

    Args:
        number: Of layers.
    """

    def __init__(self, number: int) -> None:
        self._layers: list[weakref.ref[StoredWeight] | None] = [None] * number
        self._stack: StackedWeight | None = None
        self._differ = False
        self._calls = threading.local()  # `now`: the call of their module on a thread

    @classmethod
    def of(cls, module: nn.Module, layers: Sequence[StoredWeight]) -> Siblings:
        """Stacks layers, which are in the kernels' layout and do not differ, of the module that calls them."""
        group = cls(len(layers))
        for place, layer in enumerate(layers):
            layer.siblings, layer.place = group, place
            group.join(layer)
        module.register_forward_pre_hook(group.begin)
        module.register_forward_hook(group.end, always_call=True)
        group._stack_again()
        return group

    def join(self, layer: StoredWeight) -> None:
        """Takes a layer into its place, unless that is taken."""
        if self._layer_at(layer.place) is None:
            self._layers[layer.place] = weakref.ref(layer)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Runs before their module's forward."""
        if not torch.compiler.is_compiling():
            self._calls.now = _Call()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Runs after it, also where it failed."""
        if not torch.compiler.is_compiling():
            self._calls.now = None

    def stacked(self) -> StackedWeight | None:
        """The weights of all; None while they are not stacked."""
        stack = self._stack
        if stack is None:
            return None
        layers = self.present()
        whole = layers is not None and all(map(StoredWeight.holds, layers, stack.parts))
        return stack if whole else None

    def part(self, layer: StoredWeight, input: Tensor, x: Tensor) -> Tensor | None:
        """A layer's part of the product of all; None if it is to compute by itself.

        Args:
            layer: One of them.
            input: What it was called with.
            x: The same in the dtype to compute in.
        """
        call: _Call | None = getattr(self._calls, "now", None)
        if call is None or torch.is_grad_enabled() or input.is_inference():
            return None
        if layer.bias is not None and layer.bias.is_inference():  # its changes are not counted either
            return None
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        if self._layer_at(layer.place) is not layer:
            return None
        stack = self.stacked() or self._stack_again()
        if stack is None:
            call.parts.clear()
            return None
        if not call.serves(input, x.dtype, stream):
            self._compute(stack, call, input, x, stream)
        found = call.parts.pop(layer.place, None)
        # A bias may have been changed since.
        return found.y if found is not None and found.bias == _state(layer.bias) else None

    def _compute(self, stack: StackedWeight, call: _Call, input: Tensor, x: Tensor, stream: Any) -> None:
        biases = self._biases()
        y = product(x, _All(stack, joined_bias(biases, stack.starts, stack.widths, x.device)))
        call.input, call.version, call.dtype, call.stream = None, input._version, x.dtype, stream
        call.parts = parts = {
            place: _Part(not_a_view(y.narrow(-1, start, width)), _state(bias))
            for place, (start, width, bias) in enumerate(zip(stack.starts, stack.widths, biases, strict=True))
        }
        call.input = weakref.ref(input, lambda _: parts.clear())  # parts live no longer than their input

    def traced(self, layer: StoredWeight, input: Tensor, dtype: torch.dtype) -> Tensor | None:
        """As `part`, where `torch.compile` traces; an export keeps every layer by itself."""
        # PyTorch 2.11 takes torch.compiler.is_exporting() for true wherever a compiler traces, but reads its flag.
        if torch.is_grad_enabled() or torch.compiler._is_exporting_flag:
            return None
        stack = self.stacked()
        if stack is None or self._layer_at(layer.place) is not layer:
            return None
        layout, own = stack.weight.layout, stack.parts[layer.place]
        return traced_part(
            input, dtype, tuple(own), tuple(stack.weight.tensors), stack.weight.order, self._biases(),
            stack.starts, stack.widths, layer.place, (layout.bits, layout.group, layout.n_in, layout.group_size),
        )  # fmt: skip

    def separate(self) -> None:
        """Gives every layer tensors of its own."""
        with exchanging, torch.inference_mode(False), torch.no_grad():
            stack, self._stack = self._stack, None
            if stack is not None:
                for place, tensors in enumerate(stack.parts):
                    there = self._layer_at(place)
                    if there is not None and there.holds(tensors):
                        there.put(tensors.contiguous())

    def _stack_again(self) -> StackedWeight | None:
        if self._differ or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return None
        with exchanging, torch.inference_mode(False), torch.no_grad():
            layers = self.present()
            weights = [] if layers is None else [layer.arranged() for layer in layers]
            if layers is None or any(weight is None for weight in weights):
                self.separate()
                return None
            first, *others = there = [weight for weight in weights if weight is not None]
            found = next(filter(None, (difference(first, other) for other in others)), None)
            if found is not None:
                self._differ = True
                log.info("layers are fused no more: what they hold now differs (%s)", found)
                return None
            stack = StackedWeight.of(there)
            make_traceable(stack)
            for layer, tensors in zip(layers, stack.parts, strict=True):
                layer.put(tensors)
            self._stack = stack
            return stack

    def present(self) -> list[StoredWeight] | None:
        """All layers; None where one is no more, as in the copy of another one alone."""
        found = [self._layer_at(place) for place in range(len(self._layers))]
        there = [layer for layer in found if layer is not None]
        return there if len(there) == len(found) else None

    def _layer_at(self, place: int) -> StoredWeight | None:
        layer = self._layers[place]
        return None if layer is None else layer()

    def _biases(self) -> list[Tensor | None]:
        layers = [self._layer_at(place) for place in range(len(self._layers))]
        return [None if layer is None else layer.bias for layer in layers]

    def __reduce__(self) -> tuple[type[Siblings], tuple[int]]:
        return Siblings, (len(self._layers),)  # copied layers join it


class _Part(NamedTuple):
    y: Tensor
    bias: tuple[int, int | None]  # the bias that was added, see `_state`


def _state(bias: Tensor | None) -> tuple[int, int | None]:
    return id(bias), None if bias is None or bias.is_inference() else bias._version


@dataclass
class _Call:
    """A call of the module on one thread, with the parts that have not been handed out."""

    input: weakref.ref[Tensor] | None = None
    version: int = 0
    dtype: torch.dtype | None = None
    stream: Any = None
    parts: dict[int, _Part] = field(default_factory=dict)

    def serves(self, input: Tensor, dtype: torch.dtype, stream: Any) -> bool:
        """Whether the parts are those of an input."""
        return (
            self.input is not None
            and self.input() is input
            and (self.version, self.dtype, self.stream) == (input._version, dtype, stream)
        )


@dataclass(frozen=True)
class _All:
    stack: StackedWeight
    bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        return self.stack.weight.product(x, self.bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        raise AssertionError("it is computed without gradients only")
