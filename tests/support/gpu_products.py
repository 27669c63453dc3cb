"""A GPU's products of arranged layers without one: `stand_in`."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import reference
from gptq_plugin.kernels.product.layout import restore

from gptq_plugin.layers import fuse, kernel_layout, stored_weight
from gptq_plugin.layers.qlinear import QuantLinear


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has layers on the CPU taken for layers on a GPU.

    Returns:
        The number of outputs of every product that several layers shared, as they come.
    """
    from gptq_plugin.kernels.product import expert_rows, products

    calls: list[int] = []

    def product(x, layout, *rest):
        calls.append(layout.n_out)
        return multiply(x, layout, *rest)

    for module in (kernel_layout, fuse, stored_weight):
        monkeypatch.setattr(module, "is_served", lambda device: True)

    def of_experts(x, ends, layout, arranged, out):
        calls.append(layout.n_out)
        start = 0
        for expert, stop in enumerate(ends.tolist()):
            every = multiply(x[start:stop], layout, arranged, None)
            out[start:stop] = every.unflatten(-1, (len(ends), -1))[:, expert]
            start = stop

    monkeypatch.setattr(products, "product", product)
    monkeypatch.setattr(expert_rows, "expert_rows", of_experts)
    monkeypatch.setattr(QuantLinear, "product", multiply_alone)
    return calls


def multiply(x, layout, arranged, bias, order=None):
    codes, scales, zeros = restore(layout, arranged)
    group = torch.arange(layout.n_in) // layout.group_size
    weight = (codes.double() - zeros.double()[group]) * scales.double()[group]
    y = (x if order is None else x[..., order]).double() @ weight
    return (y if bias is None else y + bias.double()).to(x.dtype)


def multiply_alone(layer, x):
    """As on a GPU, a layer takes the kernels' layout when it computes."""
    if not layer.arrange():
        return reference.matmul(x, *layer.packed(), layer.bits, layer.bias)
    weight = layer.arranged()
    return multiply(x, weight.layout, weight.tensors, layer.bias, weight.order)
