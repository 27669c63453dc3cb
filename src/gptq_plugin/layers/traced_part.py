"""A layer's part of the product of all, in what a compiler traces: `traced_part`, `make_traceable`.

Tested by tests/layers/test_siblings.py: through the layers that have it.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gptq_plugin.layers.product_op import arranged_linear
from gptq_plugin.layers.stacked_weight import StackedWeight, joined_bias

_traced = threading.local()  # `last`: the product of all that was traced last

Tensors = tuple[Tensor, Tensor, Tensor | None]  # of `kernels.product.layout.Arranged`


class _Last:
    """A product of all, for the layers that are traced next."""

    def __init__(self, input: Tensor, dtype: torch.dtype, words: Tensor, parts: dict[int, Tensor]) -> None:
        self.input = weakref.ref(input, lambda _: parts.clear())  # nothing of a trace outlives it
        self.version, self.dtype = input._version, dtype
        self.words = weakref.ref(words)
        self.parts = parts

    def serves(self, input: Tensor, dtype: torch.dtype, words: Tensor) -> bool:
        same = self.input() is input and self.words() is words
        return same and (self.version, self.dtype) == (input._version, dtype)


def traced_part(
    input: Tensor, dtype: torch.dtype, own: Tensors, stack: Tensors, order: Tensor | None,
    biases: Sequence[Tensor | None], starts: Sequence[int], widths: Sequence[int], place: int, sizes: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """A layer's part of x Wᵀ + bias.

    A compiler keeps the call as it is (`make_traceable`), and makes it when it traces for good: with tensors that stand
    for others, whose changes are counted as those of any. One product then serves the calls with one of them,
    unchanged. Called with values, each computes its own.

    Args:
        input: What the layer was called with.
        dtype: To compute in.
        own: The layer's tensors.
        stack: Those of all layers.
        order: See `ArrangedWeight`.
        biases: Of all layers.
        starts, widths: See `StackedWeight`.
        place: The layer's among them.
        sizes: bits, group, n_in and group_size of `kernels.product.layout.Layout`.
    """
    bits, group, n_in, group_size = sizes
    if type(input) in (Tensor, nn.Parameter) or input.is_inference():
        return arranged_linear(  # type: ignore[no-any-return]
            input.to(dtype), *own, order, biases[place], bits, group, n_in, widths[place], group_size
        )
    last: _Last | None = getattr(_traced, "last", None)
    if last is None or not last.serves(input, dtype, stack[0]) or place not in last.parts:
        end = starts[-1] + widths[-1]
        bias = joined_bias(biases, starts, widths, input.device)
        y = arranged_linear(input.to(dtype), *stack, order, bias, bits, group, n_in, end, group_size)
        cut = zip(starts, widths, strict=True)
        parts = {number: y.narrow(-1, start, width).contiguous() for number, (start, width) in enumerate(cut)}
        last = _traced.last = _Last(input, dtype, stack[0], parts)
    return last.parts.pop(place)


def make_traceable(stack: StackedWeight) -> None:
    """Tells `torch.compile` of `traced_part`, and that tensors stay where they are, as those of modules do: its CUDA
    graphs would copy others for every replay."""
    _allow()
    for tensor in itertools.chain(stack.weight.tensors, *stack.parts):
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor)


@functools.cache
def _allow() -> None:
    torch.compiler.allow_in_graph(traced_part)  # not at import: it imports the compiler
