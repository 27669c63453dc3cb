"""The product in the kernels' layout as operators of PyTorch: `arranged_linear`, `arranged_weight`.

Compilers and exporters keep them as they are; importing gptq_plugin registers them as `torch.ops.gptq_plugin.*`.

Tested by tests/layers/test_qlinear.py: through the layer that has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptq_plugin.kernels.product.layout import Arranged, Layout


@torch.library.custom_op("gptq_plugin::arranged_linear", mutates_args=())
def arranged_linear(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None,
    bias: Tensor | None, bits: int, group: int, n_in: int, n_out: int, group_size: int,
) -> Tensor:  # fmt: skip
    """x Wᵀ + bias; see `kernels.product.products.product`.

    Args:
        x: float16, bfloat16 or float32 [..., in], on a GPU.
        words, scales, zeros: See `kernels.product.layout`.
        order: int64 [in] or None, see `ArrangedWeight`.
        bias: [out] or None.
        bits, group, n_in, n_out, group_size: See `kernels.product.layout.Layout`.
    """
    from gptq_plugin.kernels.product import products  # imported here: needs Triton

    layout = Layout(bits, group, n_in, n_out, group_size, zeros is None)
    return products.product(x, layout, Arranged(words, scales, zeros), bias, order)


@arranged_linear.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[8])


@torch.library.custom_op("gptq_plugin::arranged_weight", mutates_args=())
def arranged_weight(
    words: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None,
    bits: int, group: int, n_in: int, n_out: int, group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight, [out, in] in `dtype`; arguments are those of `arranged_linear`."""
    from gptq_plugin.kernels.product import products  # imported here: needs Triton

    layout = Layout(bits, group, n_in, n_out, group_size, zeros is None)
    return products.weight(layout, Arranged(words, scales, zeros), dtype, order)


@arranged_weight.register_fake
def _(words: Tensor, *rest: Any) -> Tensor:
    return words.new_empty(rest[6], rest[5], dtype=rest[8])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors = inputs[:5]
    ctx.save_for_backward(*tensors)
    ctx.sizes = inputs[6:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad @ arranged_weight(*ctx.saved_tensors, *ctx.sizes, grad.dtype), *(None,) * 10


arranged_linear.register_autograd(_gradient, setup_context=_keep)
