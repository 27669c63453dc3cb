"""The running sum of x xᵀ over calibration tokens: `Hessian`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.device.precision import full_precision

# The sum is symmetric, so only a staircase of strips is computed: each row's columns up to the end of its strip.
# A narrow strip wastes little above the diagonal, a wide one keeps the product efficient.
_STRIP = {"cuda": 1024, "cpu": 256}


class Hessian:
    """Sum of x xᵀ and the number of tokens in it. Sums of several ranks add up.

    Args:
        in_features: Width of the layer's input.
        device: Device of the sum; inputs must be there too.
        dtype: Precision of the sum, float32 or float64.

    Attributes:
        sum: [in, in], Σ x xᵀ, complete on and below the diagonal.
        tokens: Rows counted so far.
    """

    def __init__(self, in_features: int, device: torch.device | str, dtype: torch.dtype = torch.float32):
        self.sum = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds every row of x, [tokens, in].

        16-bit inputs on a GPU are multiplied without conversion: their products are exact in the tensor cores' float32.
        Other inputs are multiplied in the sum's precision, float32 without TF32.
        """
        # The model may have switched autocast on around this call.
        with full_precision(x.device):
            x = x.detach()
            unconverted = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and self.sum.dtype == torch.float32
            rows = x if unconverted else x.to(self.sum.dtype)
            for start, stop in self._strips():
                strip = self.sum[start:stop, :stop]
                left, right = rows[:, start:stop].T, rows[:, :stop]
                if unconverted:
                    torch.addmm(strip, left, right, out_dtype=torch.float32, out=strip)  # type: ignore[call-overload]
                else:
                    strip.addmm_(left, right)
            self.tokens += rows.shape[0]

    def over_ranks(self) -> None:
        """Adds up the sums and the tokens of all ranks, on every rank, in one message without the symmetric half."""
        if not distributed.active():
            return
        strips = [self.sum[start:stop, :stop] for start, stop in self._strips()]
        message = torch.cat([strip.flatten() for strip in strips])
        self.tokens = distributed.sum_(message, self.tokens)
        for strip, total in zip(strips, message.split([strip.numel() for strip in strips]), strict=True):
            strip.copy_(total.view(strip.shape))

    def mean(self) -> Tensor:
        """Mean over tokens of x xᵀ, [in, in], symmetric; zeros when nothing was counted."""
        mean = self.sum / max(1, self.tokens)
        for start, stop in self._strips():
            mean[start:stop, stop:] = mean[stop:, start:stop].T
        return mean

    def _strips(self) -> Iterator[tuple[int, int]]:
        n = len(self.sum)
        width = _STRIP.get(self.sum.device.type, n)
        for start in range(0, n, width):
            yield start, min(start + width, n)
