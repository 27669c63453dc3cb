"""The quantized layers of all experts in one product: `ExpertStack`."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.kernels.product.layout import OUTPUTS
from gptq_plugin.layers.grouped_product import grouped_product, has_grouped_product
from gptq_plugin.layers.kernel_layout import ArrangedWeight
from gptq_plugin.layers.qlinear import QuantLinear, output_dtype
from gptq_plugin.layers.siblings import Siblings
from gptq_plugin.layers.stacked_weight import StackedWeight, difference
from gptq_plugin.layers.stored_weight import StoredWeight

log = logging.getLogger(__name__)

_BIAS = operator.itemgetter("bias")
_MOST = 64  # rows of an expert, on average, up to which the kernel for few rows is taken
_DENSE = 2**29  # weights that may be written as bfloat16 at a time


class ExpertStack(Siblings):
    """Layers of experts whose weights are stacked in memory, expert after expert.

    A call of all of them takes one product for all; called by itself, each computes by itself.
    """

    _hooks: list[Any]  # the layers' dicts
    _buffers: list[dict[str, Any]]  # likewise

    @classmethod
    def of_experts(cls, experts: Sequence[Sequence[StoredWeight]]) -> ExpertStack | None:
        """Stacks the layers of experts, which are alike for all and whose outputs are concatenated.

        Returns:
            None, with the reason in the log (INFO), where one product does not serve them.
        """
        layers = [layer for own in experts for layer in own]
        reason = _hindrance(experts)
        if reason is not None:
            log.info("experts are multiplied one by one: %s", reason)
            return None
        group = cls(len(layers))
        for place, layer in enumerate(layers):
            layer.siblings, layer.place = group, place
            group.join(layer)
        return group if group._stack_again() is not None else None

    def part(self, layer: StoredWeight, input: Tensor, x: Tensor) -> Tensor | None:
        """None: each computes by itself."""
        return None

    def traced(self, layer: StoredWeight, input: Tensor, dtype: torch.dtype) -> Tensor | None:
        """None, likewise."""
        return None

    def stacked(self) -> StackedWeight | None:
        """None: no product of a layer is that of all."""
        return None

    @classmethod
    def having(cls, layers: Sequence[Any]) -> ExpertStack | None:
        """The stack of just these layers, expert after expert; None if they have none."""
        group = getattr(layers[0], "siblings", None)
        return group if isinstance(group, cls) and group.present() == list(layers) else None

    def of_all(self, x: Tensor, ends: Tensor) -> Tensor | None:
        """The product of rows with their experts' layers.

        Args:
            x: [rows, in], sorted by expert.
            ends: Where the experts' rows end, int32 [experts].

        Returns:
            [rows, outputs of an expert], 0 for rows of no expert; None if the layers are to be called: one has a hook
            or was given a bias, gradients are on, there is no product for so many rows, or weights or rows are
            elsewhere.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        stack = self._stack or self._stack_again()
        if stack is None or x.device != stack.weight.tensors.words.device or any(self._hooks) or self._biased():
            return None
        x, weight = x.to(output_dtype(x)), stack.weight
        if len(x) <= _MOST * len(ends):
            return _of_few(weight, _ordered(x, weight), ends)
        if weight.layout.n_out * weight.layout.n_in > _DENSE or not has_grouped_product(x, _outputs(weight, ends)):
            return None
        return _of_many(weight, _ordered(x, weight), ends)

    def _biased(self) -> bool:
        """Whether a layer was given a bias; takes some ten microseconds for hundreds."""
        return any(map(operator.is_not, map(_BIAS, self._buffers), itertools.repeat(None)))

    def _stack_again(self) -> StackedWeight | None:
        layers = self.present() or []
        self._buffers = [layer._buffers for layer in layers]
        self._hooks = [hooks for layer in layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
        return super()._stack_again()

    def __reduce__(self) -> tuple[type[ExpertStack], tuple[int]]:
        return ExpertStack, (len(self._layers),)


def _ordered(x: Tensor, weight: ArrangedWeight) -> Tensor:
    """Rows with channels in the weight's order."""
    return x.contiguous() if weight.order is None else x.index_select(1, weight.order)


def _outputs(weight: ArrangedWeight, ends: Tensor) -> int:
    """Outputs of an expert."""
    return weight.layout.n_out // len(ends)


def _of_few(weight: ArrangedWeight, x: Tensor, ends: Tensor) -> Tensor:
    from gptq_plugin.kernels.product import expert_rows  # imported here: needs Triton

    out = x.new_zeros(len(x), _outputs(weight, ends))
    expert_rows.expert_rows(x, ends.contiguous(), weight.layout, weight.tensors, out)
    return out


def _of_many(weight: ArrangedWeight, x: Tensor, ends: Tensor) -> Tensor:
    """Takes as long as reading the weights and writing them as bfloat16, which the rows outweigh."""
    from gptq_plugin.kernels.product import products  # imported here: needs Triton

    whole = products.weight(weight.layout, weight.tensors, x.dtype)
    return grouped_product(x, ends, whole.unflatten(0, (len(ends), -1)))


def _hindrance(experts: Sequence[Sequence[StoredWeight]]) -> str | None:
    """Why one product does not serve these layers; None if it does. Waits for the GPU."""
    layers = [layer for own in experts for layer in own]
    if not all(isinstance(layer, QuantLinear) for layer in layers):
        return "some are not quantized"
    weights = [layer.arranged() for layer in layers]
    there = [weight for weight in weights if weight is not None]
    if len(there) < len(layers):
        return "some are not in the layout of the kernels"
    if any(layer.bias is not None for layer in layers):
        return "they have biases"
    sizes = {tuple(layer.out_features for layer in own) for own in experts}
    if len(sizes) > 1 or any(size % OUTPUTS for own in sizes for size in own):
        return f"their numbers of outputs differ, or are no multiples of {OUTPUTS}"
    return next(filter(None, (difference(there[0], other) for other in there[1:])), None)
