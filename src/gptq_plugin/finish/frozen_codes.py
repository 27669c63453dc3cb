"""A quantized layer whose scales can be trained: `FrozenCodes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.kernels.reference import unpack
from gptq_plugin.layers.packing import unpack_weight
from gptq_plugin.layers.qlinear import QuantLinear, output_dtype


class FrozenCodes(nn.Module):
    """Computes what a `QuantLinear` does, with W = codes * scales, and has gradients for the scales.

    A scale is that of the layer times exp(`log_ratio`), rounded to float16 as checkpoints store it; gradients pass the
    rounding unchanged. So the weight is, bit for bit, what the layer's `dequantize` gives with `rounded_scales`.

    Args:
        layer: Its tensors are read; it is not changed.
        device: Where to compute.

    Attributes:
        bits: Width of a code.

    Buffers and parameters, with G groups:
        codes: int8 or int16 [out, in], codes less their zeros
        start: float32 [out, G], the layer's scales
        groups: int64 [in], or None if all groups are of one size and in order
        bias: As the layer's
        log_ratio: float32 [out, G], trained
    """

    codes: Tensor
    start: Tensor
    groups: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QuantLinear, device: torch.device) -> None:
        super().__init__()
        packed = [tensor.to(device) for tensor in layer.packed()]
        qweight, qzeros, scales, g_idx = packed
        codes = unpack_weight(qweight, layer.bits, layer.in_features)
        zeros = unpack(qzeros.t(), layer.bits, layer.out_features)  # [out, G]
        size = layer.channels_per_group()
        in_order = torch.arange(layer.in_features, device=device) // size
        regular = layer.in_features % size == 0 and bool(torch.equal(g_idx.long(), in_order))
        differences = codes.short() - zeros.short()[:, g_idx.long()]
        if layer.bits < 8 or bool((zeros == 128).all()):
            differences = differences.to(torch.int8)
        self.register_buffer("codes", differences)
        self.register_buffer("start", scales.t().float().contiguous())
        self.register_buffer("groups", None if regular else g_idx.long())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(device))
        self.log_ratio = nn.Parameter(torch.zeros_like(self.start))
        self.bits = layer.bits
        self._dtype = layer.weight.dtype

    @property
    def weight(self) -> Tensor:
        """For models that read a weight's dtype, device or shape: NaN, [out, in], in the memory of one number."""
        return torch.full((), torch.nan, dtype=self._dtype, device=self.codes.device).expand(self.codes.shape)

    def forward(self, input: Tensor) -> Tensor:  # the name under which nn.Linear's callers know it
        """Maps [..., in] to [..., out], as `QuantLinear` does."""
        x = input.to(output_dtype(input))
        y: Tensor = _Product.apply(x, self._scales(), self.codes, self.groups)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def rounded_scales(self) -> Tensor:
        """The scales as a checkpoint stores them: float16 [G, out]."""
        return self._scales().half().t().contiguous()

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in]."""
        return weight_of(self.codes, self._scales(), self.groups, dtype)

    def _scales(self) -> Tensor:
        scales = self.start * self.log_ratio.exp()
        return scales + (scales.half().float() - scales).detach()


class _Product(torch.autograd.Function):
    """x Wᵀ; the weight is made again for the backward, in place of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, codes: Tensor, groups: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scales, codes, groups)
        return x @ weight_of(codes, scales, groups, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scales, codes, groups = ctx.saved_tensors
        of_x = grad @ weight_of(codes, scales, groups, grad.dtype) if ctx.needs_input_grad[0] else None
        of_scales = None
        if ctx.needs_input_grad[1]:
            of_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
            of_scales = sums_by_group(of_weight.float() * codes, groups, scales.shape[1])
        return of_x, of_scales, None, None


def weight_of(codes: Tensor, scales: Tensor, groups: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W, [out, in]: exact in float32, as a scale has 11 bits and a code at most 9, then rounded once."""
    if groups is not None:
        return (codes * scales[:, groups]).to(dtype)
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1).to(dtype)


def sums_by_group(values: Tensor, groups: Tensor | None, count: int) -> Tensor:
    """Sums [out, in] over the channels of each group: [out, groups]. The order of sums is always the same."""
    if groups is None:
        return values.unflatten(1, (count, -1)).sum(-1)
    return values @ nn.functional.one_hot(groups, count).to(values.dtype)
