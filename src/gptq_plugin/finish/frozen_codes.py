"""A quantized layer whose scales can be trained: `FrozenCodes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.kernels import latent_passes
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
        self.register_buffer("codes", differences.contiguous())
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
        y: Tensor = _Product.apply(x, self.log_ratio, self.values, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def values(self) -> Tensor:
        """What is rounded to codes, [out, in]."""
        return self.codes

    @property
    def ends(self) -> tuple[Tensor, Tensor] | None:
        """The least and the greatest code of a group, float32 [out, G], if codes are trained."""
        return None

    @torch.no_grad()
    def rounded_scales(self) -> Tensor:
        """The scales as a checkpoint stores them: float16 [G, out]."""
        return self.scales().half().t().contiguous()

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in]."""
        return self.weight_of(self.values, as_stored(self.scales()), dtype)

    def weight_of(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in], with these scales."""
        passes = latent_passes(values, self.groups)
        weight: Tensor = passes.weight_of(values, scales, self.ends, self.groups, dtype)
        return weight

    def gradients(self, of_weight: Tensor, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients for the scales, and for the values if these are trained."""
        passes = latent_passes(values, self.groups)
        found: tuple[Tensor, Tensor | None] = passes.gradients(of_weight, values, scales, self.ends, self.groups)
        return found

    def scales(self) -> Tensor:
        """The scales before they are rounded, float32 [out, G]."""
        return self.start * self.log_ratio.exp()


class _Product(torch.autograd.Function):
    """x Wᵀ; the weight is made again for the backward, in place of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_ratio: Tensor, values: Tensor, layer: FrozenCodes) -> Tensor:
        scales = layer.scales()
        stored = as_stored(scales)
        ctx.layer = layer
        ctx.save_for_backward(x, values, scales, stored)
        return x @ layer.weight_of(values, stored, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, values, scales, stored = ctx.saved_tensors
        of_x = of_scales = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ ctx.layer.weight_of(values, stored, grad.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
            of_scales, of_values = ctx.layer.gradients(of_weight, values, stored)
            of_scales *= scales
        return of_x, of_scales, of_values, None


def as_stored(scales: Tensor) -> Tensor:
    """Scales rounded to float16."""
    return scales.half().float()
