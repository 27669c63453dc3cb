"""A quantized layer whose codes can be trained, beside its scales: `LatentCodes`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptq_plugin.finish.frozen_codes import FrozenCodes, as_stored
from gptq_plugin.kernels import latent_passes
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
        self.register_buffer("low", -zeros.float().contiguous())
        self.register_buffer("high", 2**layer.bits - 1 + self.low)
        self.latent = nn.Parameter(self.codes.float())
        self.codes = torch.empty(0, dtype=torch.int8, device=device)  # the latents hold them

    @torch.no_grad()
    def begin_at(self, wanted: Tensor) -> None:
        """Has latents begin at a weight, [out, in], or as near to it as is rounded to their codes: the weight that the
        layer computes with stays, bit for bit."""
        codes = self._rounded()
        apart = wanted.detach().to(codes) / self._of_channels(self.start) - codes
        self.latent.copy_(codes + torch.where(torch.isfinite(apart), apart, 0.0).clamp_(-_WITHIN, _WITHIN))

    @property
    def weight(self) -> Tensor:
        return torch.full((), torch.nan, dtype=self._dtype, device=self.latent.device).expand(self.latent.shape)

    @property
    def values(self) -> Tensor:
        return self.latent

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    @torch.no_grad()
    def packed_codes(self) -> Tensor:
        """The codes as `QuantLinear` has them: `qweight`, int32 [words, out]."""
        codes = self._rounded().to(torch.int16) + self._of_channels(self.zeros)
        return pack_weight(codes.to(torch.uint8), self.bits)

    @torch.no_grad()
    def wanted(self) -> Tensor:
        """The weight before it is rounded, float32 [out, in]: what another `LatentCodes` of the layer begins at."""
        return self.latent * self._of_channels(as_stored(self.scales()))

    def _rounded(self) -> Tensor:
        """The codes, float32 [out, in]."""
        passes, ones = latent_passes(self.latent, self.groups), torch.ones_like(self.start)
        rounded: Tensor = passes.weight_of(self.latent, ones, self.ends, self.groups, torch.float32)
        return rounded

    def _of_channels(self, values: Tensor) -> Tensor:
        """Values [out, G] of groups for their channels, [out, in]."""
        if self.groups is not None:
            return values[:, self.groups]
        return values.repeat_interleave(self.latent.shape[1] // values.shape[1], 1)
