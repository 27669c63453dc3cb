"""float32 products at float32's accuracy on a GPU's tensor cores, which multiply 10-bit TF32.

A float32 number is the sum of a TF32 number and a remainder. Of the four products of two such sums the one of the
remainders, 2^-22 of the whole, is left out (the scheme known as 3xTF32: Ootomo and Yokota, arXiv:2203.03341). Three
products on the tensor cores take less time than one on the float32 units as soon as they are large enough.

Tensor cores cut off what they add up instead of rounding it, so the error grows with the inner dimension: 1e-5 of the
result at 4096 (measured; float32 units: 1e-6). Products here are at most 1024 deep and are added up in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin.precision import tf32


@dataclass(frozen=True)
class Split:
    """A float32 tensor as the sum of two.

    Attributes:
        high: What TF32 holds of it, exactly representable there.
        low: The rest.
    """

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Split:
        """Splits a float32 tensor, which is not changed."""
        # 13 of the 23 bits go; adding half of the last bit that stays rounds to nearest.
        high = x.contiguous().view(torch.int32).add(1 << 12).bitwise_and_(-1 << 13).view(torch.float32)
        return cls(high, x - high)

    def columns(self, start: int | None, stop: int | None = None) -> Split:
        """The last dimension's start..stop."""
        return Split(self.high[..., start:stop], self.low[..., start:stop])

    @property
    def mT(self) -> Split:
        return Split(self.high.mT, self.low.mT)


def add_product(out: Tensor, a: Split, b: Split, alpha: float = 1.0) -> None:
    """out += alpha · a @ b, for batches of matrices [B, ., .]; the small terms first. Inside `full_precision`."""
    with tf32(out.device):
        for left, right in ((a.low, b.high), (a.high, b.low), (a.high, b.high)):
            torch.baddbmm(out, left, right, alpha=alpha, out=out)
