"""The product of a quantized weight as a function with a gradient: `product`.

Tested by tests/layers/test_qlinear.py: through the layer that has it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Weight(Protocol):
    """A weight that multiplies."""

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W, [out, in]."""


def product(x: Tensor, weight: Weight) -> Tensor:
    """x Wᵀ + bias. It has a gradient for x unless none can be asked for: what PyTorch does around a Function takes
    longer than the rest of a layer's Python.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return Product.apply(x, weight) if torch.is_grad_enabled() or transformed else Product.forward(x, weight)


class Product(torch.autograd.Function):
    """The product, with a gradient for x: dL/dx = dL/dy W. Backward dequantizes W again instead of keeping it."""

    @staticmethod
    def forward(x: Tensor, weight: Weight) -> Tensor:
        return not_a_view(weight.product(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Weight], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.dequantize(grad.dtype), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, weight: Weight) -> tuple[Tensor, int]:
        return Product.apply(x.movedim(in_dims[0], 0), weight), 0  # any number of dimensions leads


def not_a_view(y: Tensor) -> Tensor:
    """The same memory as a tensor that autograd takes for no view: views that a Function returns cannot be changed in
    place. PyTorch's own products end in the same operation."""
    return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]
