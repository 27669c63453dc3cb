"""The running sum of x xᵀ over calibration tokens: `Hessian`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.device.precision import full_precision
from gptq_plugin.kernels import exact_sums, mirror_passes
from gptq_plugin.kernels.strips import Strips

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
        self._strips = strips_on(device, in_features)
        self._sum = torch.zeros(self._strips.size, dtype=torch.float64 if self._exact else dtype, device=device)

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
        if self._exact:
            add_exactly(self._sum, self._strips, x)
            return
        narrow = is_narrow(x) and self._dtype == torch.float32
        rows = x if narrow else x.to(self._dtype)
        for strip, (start, stop) in zip(self._strips.of(self._sum), self._strips.bounds, strict=True):
            left, right = rows[:, start:stop].T, rows[:, :stop]
            if narrow:
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
        n, tokens = self.in_features, self.tokens
        mean = whole(self._sum[None], self._strips, max(1, tokens), self._dtype)[0]
        return mean if beside is None else (mean * tokens + beside * n) / (tokens + n)


def strips_on(device: torch.device | str, in_features: int) -> Strips:
    """Where a sum lies on a device to which a library's products are added."""
    return Strips(in_features, _STRIP.get(torch.device(device).type, in_features))


def add_each(hessians: Sequence[Hessian], rows: Sequence[Tensor]) -> None:
    """`Hessian.add` for several, of rows on one device."""
    # The model may have switched autocast on around this call.
    with full_precision(rows[0].device):
        for hessian, own in zip(hessians, rows, strict=True):
            hessian._add(own.detach())


def is_narrow(x: Tensor) -> bool:
    """True for rows whose products a GPU adds up exactly as they are, in 16 bits."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def add_exactly(total: Tensor, strips: Strips, x: Tensor) -> None:
    """Adds XᵀX of rows X, [tokens, in], to float64 strips, so that the order of calls does not matter."""
    narrow = is_narrow(x)
    rows, diagonal = x if narrow else x.float(), torch.empty(strips.n, dtype=torch.float32, device=x.device)
    for strip, (start, stop) in zip(strips.of(total), strips.bounds, strict=True):
        left, right = rows[:, start:stop].T, rows[:, :stop]
        product = torch.mm(left, right, out_dtype=torch.float32) if narrow else left @ right
        diagonal[start:stop] = product.diagonal(start)
        exact_sums(product).add_product(strip, product, diagonal, start)


def whole(sums: Tensor, strips: Strips, divisors: Tensor | int, dtype: torch.dtype) -> Tensor:
    """Symmetric matrices [E, in, in] of sums [E, size] in strips, which must be complete on and below the diagonal.

    Args:
        sums: As above.
        strips: Where their parts lie.
        divisors: By which entries are divided, all of them or those of each matrix, [E, 1, 1].
        dtype: Of the matrices.
    """
    found = torch.empty(len(sums), strips.n, strips.n, dtype=dtype, device=sums.device)
    for strip, (start, stop) in zip(strips.of(sums), strips.bounds, strict=True):
        torch.div(strip, divisors, out=found[:, start:stop, :stop])
    mirrored: Tensor = mirror_passes(found).symmetric_(found)
    return mirrored


def add_products(total: Tensor, rows: Tensor) -> None:
    """Adds XᵀX of narrow rows X, [tokens, in], to float32 [in, in]: on and below the diagonal, and some of the rest."""
    width = _STRIP["cuda"]
    for start in range(0, len(total) if len(rows) else 0, width):
        stop = min(start + width, len(total))
        strip, left = total[start:stop, :stop], rows[:, start:stop].T
        torch.addmm(strip, left, rows[:, :stop], out_dtype=torch.float32, out=strip)  # type: ignore[call-overload]
