"""The running sum of x xᵀ over calibration tokens: `Hessian`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.device.precision import full_precision
from gptq_plugin.kernels import exact_sums

# The sum is symmetric, so only a staircase of strips is computed: each row's columns up to the end of its strip.
# A narrow strip wastes little above the diagonal, a wide one keeps the product efficient.
_STRIP = {"cuda": 1024, "cpu": 256}


class Hessian:
    """Sum of x xᵀ and the number of tokens in it.

    Each call of `add` is one float32 product. Products are added in float64, exactly (`plain_sums`), so that neither
    their order matters nor the ranks they were made on; or in float32 as they come, which a GPU does in the products'
    own kernels. Half a matrix in float64 takes the memory of a whole one in float32.

    Args:
        in_features: Width of the layer's input.
        device: Device of the sum; inputs must be there too.
        dtype: Precision of the products and of the mean. In float64 the order of addition shows in the last bits.
        exact: Add float32 products exactly.

    Attributes:
        in_features: As given.
        tokens: Rows counted so far.
    """

    def __init__(
        self, in_features: int, device: torch.device | str, dtype: torch.dtype = torch.float32, *, exact: bool = True
    ):
        self.in_features = in_features
        self.tokens = 0
        self._dtype = dtype
        self._exact = exact and dtype == torch.float32
        width = _STRIP.get(torch.device(device).type, in_features)
        self._ends = [*range(0, in_features, max(1, width)), in_features]
        sizes = [(stop - start) * stop for start, stop in pairwise(self._ends)]
        self._sum = torch.zeros(
            sum(sizes), dtype=torch.float64 if self._exact else dtype, device=device
        )  # strip after strip
        self._strips = [
            strip.view(-1, stop) for strip, stop in zip(self._sum.split(sizes), self._ends[1:], strict=True)
        ]

    def add(self, x: Tensor) -> None:
        """Adds every row of x, [tokens, in].

        16-bit inputs on a GPU are multiplied without conversion: their products are exact in the tensor cores' float32.
        Other inputs are multiplied in the Hessian's dtype, float32 without TF32.
        """
        add_each([self], [x])

    def _add(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        if not x.shape[0]:
            return
        narrow = is_narrow(x) and self._dtype == torch.float32
        rows = x if narrow else x.to(self._dtype)
        if self._exact:
            diagonal = torch.empty(self.in_features, dtype=self._dtype, device=x.device)
        for strip, (start, stop) in zip(self._strips, pairwise(self._ends), strict=True):
            left, right = rows[:, start:stop].T, rows[:, :stop]
            if self._exact:
                product = torch.mm(left, right, out_dtype=torch.float32) if narrow else left @ right
                diagonal[start:stop] = product.diagonal(start)
                exact_sums(product).add_product(strip, product, diagonal, start)
            elif narrow:
                torch.addmm(strip, left, right, out_dtype=torch.float32, out=strip)  # type: ignore[call-overload]
            else:
                strip.addmm_(left, right)

    def over_ranks(self) -> None:
        """Adds up the sums and the tokens of all ranks, on every rank, in one message without the symmetric half."""
        if distributed.active():
            self.tokens = distributed.sum_(self._sum, self.tokens)

    def mean(self, beside: Tensor | None = None) -> Tensor:
        """Mean over tokens of x xᵀ, [in, in], symmetric; zeros when nothing was counted.

        Args:
            beside: The mean, [in, in], of as many other tokens as there are inputs, which are weighted in.
        """
        n = self.in_features
        mean = torch.empty(n, n, dtype=self._dtype, device=self._sum.device)
        for strip, (start, stop) in zip(self._strips, pairwise(self._ends), strict=True):
            mean[start:stop, :stop] = strip / max(1, self.tokens)
        for start, stop in pairwise(self._ends):
            mean[start:stop, stop:] = mean[stop:, start:stop].T
        return mean if beside is None else (mean * self.tokens + beside * n) / (self.tokens + n)


def add_each(hessians: Sequence[Hessian], rows: Sequence[Tensor]) -> None:
    """`Hessian.add` for several, of rows on one device."""
    # The model may have switched autocast on around this call.
    with full_precision(rows[0].device):
        for hessian, own in zip(hessians, rows, strict=True):
            hessian._add(own.detach())


def is_narrow(x: Tensor) -> bool:
    """True for rows whose products a GPU adds up exactly as they are, in 16 bits."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def add_products(total: Tensor, rows: Tensor) -> None:
    """Adds XᵀX of narrow rows X, [tokens, in], to float32 [in, in]: on and below the diagonal, and some of the rest."""
    width = _STRIP["cuda"]
    for start in range(0, len(total) if len(rows) else 0, width):
        stop = min(start + width, len(total))
        strip, left = total[start:stop, :stop], rows[:, start:stop].T
        torch.addmm(strip, left, rows[:, :stop], out_dtype=torch.float32, out=strip)  # type: ignore[call-overload]
