"""A quantized layer whose codes can be trained, beside its scales: `LatentCodes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.finish.frozen_codes import FrozenCodes, output_dtype, sums_by_group, weight_of
from gptq_plugin.kernels.reference import unpack
from gptq_plugin.layers.packing import pack_weight
from gptq_plugin.layers.qlinear import QuantLinear

_WITHIN = 0.499  # of a step from its code: what begins there is rounded to it


class LatentCodes(FrozenCodes):
    """Computes what a `QuantLinear` does, with W = scales * round(`latent`), and has gradients for the latents too.

    Latents are in steps of their scales, from the zero. They are rounded to codes that `bits` can hold; gradients pass
    the rounding unchanged, but for those that would lead further beyond the ends of the grid.

    Args:
        layer: Its tensors are read; it is not changed.
        device: Where to compute. Latents begin at the codes.

    Buffers and parameters, beside those of `FrozenCodes`:
        low, high: float32 [out, G], the ends of the grids
        zeros: int16 [out, G]
        latent: float32 [out, in], trained
    """

    low: Tensor
    high: Tensor
    zeros: Tensor

    def __init__(self, layer: QuantLinear, device: torch.device) -> None:
        super().__init__(layer, device)
        zeros = unpack(layer.packed().qzeros.to(device).t(), layer.bits, layer.out_features).short()
        self.register_buffer("zeros", zeros)
        self.register_buffer("low", -zeros.float())
        self.register_buffer("high", 2**layer.bits - 1 - zeros.float())
        self.latent = nn.Parameter(self.codes.float())
        self.codes = torch.empty(0, dtype=torch.int8, device=device)  # the latents hold them

    @torch.no_grad()
    def begin_at(self, wanted: Tensor) -> None:
        """Has latents begin at a weight, [out, in], or as near to it as is rounded to their codes: the weight that the
        layer computes with stays, bit for bit."""
        codes = _by_group(self._rounded(), self.start, self.groups)
        wanted = _by_group(wanted.detach().to(codes.device, torch.float32).contiguous(), self.start, self.groups)
        apart = wanted / _of_channels(self.start, self.groups) - codes
        apart = torch.where(torch.isfinite(apart), apart, 0.0).clamp_(-_WITHIN, _WITHIN)
        self.latent.copy_((codes + apart).view_as(self.latent))

    @property
    def weight(self) -> Tensor:
        return torch.full((), torch.nan, dtype=self._dtype, device=self.latent.device).expand(self.latent.shape)

    def forward(self, input: Tensor) -> Tensor:  # the name under which nn.Linear's callers know it
        x = input.to(output_dtype(input))
        y: Tensor = _Product.apply(x, self._scales(), self.latent, self.low, self.high, self.groups)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return weight_of(self._rounded(), self._scales(), self.groups, dtype)

    @torch.no_grad()
    def packed_codes(self) -> Tensor:
        """The codes as `QuantLinear` has them: `qweight`, int32 [words, out]."""
        codes = _by_group(self._rounded().short(), self.zeros, self.groups) + _of_channels(self.zeros, self.groups)
        return pack_weight(codes.to(torch.uint8).view_as(self.latent), self.bits)

    @torch.no_grad()
    def wanted(self) -> Tensor:
        """The weight before it is rounded, float32 [out, in]: what another `LatentCodes` of the layer begins at."""
        return weight_of(self.latent, self._scales(), self.groups, torch.float32)

    def _rounded(self) -> Tensor:
        return _rounded(self.latent, self.low, self.high, self.groups)


class _Product(torch.autograd.Function):
    """x Wᵀ; codes and weight are made again for the backward, in place of being kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, latent: Tensor, low: Tensor, high: Tensor, groups: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, scales, latent, low, high, groups)
        return x @ weight_of(_rounded(latent, low, high, groups), scales, groups, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, scales, latent, low, high, groups = ctx.saved_tensors
        codes = _rounded(latent, low, high, groups)
        of_x = grad @ weight_of(codes, scales, groups, grad.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        of_scales = sums_by_group(of_weight * codes, groups, scales.shape[1])
        of_latent, latents = _by_group(of_weight, scales, groups), _by_group(latent, scales, groups)
        of_latent *= _of_channels(scales, groups)
        beyond = (latents > _of_channels(high, groups)) & (of_latent < 0)
        beyond |= (latents < _of_channels(low, groups)) & (of_latent > 0)
        return of_x, of_scales, of_latent.masked_fill_(beyond, 0.0).view_as(latent), None, None, None


def _rounded(latent: Tensor, low: Tensor, high: Tensor, groups: Tensor | None) -> Tensor:
    """The codes, float32 [out, in], of latents."""
    codes = _by_group(latent, low, groups).round()
    return codes.clamp_(_of_channels(low, groups), _of_channels(high, groups)).view_as(latent)


def _by_group(values: Tensor, like: Tensor, groups: Tensor | None) -> Tensor:
    """Values [out, in] for the sake of `_of_channels`: [out, G, channels] where groups are in order."""
    return values.unflatten(1, (like.shape[1], -1)) if groups is None else values


def _of_channels(values: Tensor, groups: Tensor | None) -> Tensor:
    """Values [out, G] of groups for their channels, to go with `_by_group`."""
    return values[..., None] if groups is None else values[:, groups]
