"""The running sums of x xᵀ over the tokens of each of several experts: `EachHessian`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptq_plugin.device.memory import with_room
from gptq_plugin.device.precision import full_precision
from gptq_plugin.kernels import mirror_passes, segment_sums
from gptq_plugin.walk.each_sum import EachSum
from gptq_plugin.walk.hessian import Hessian, add_each, add_products, is_narrow

_WIDE = 4096  # inputs


class EachHessian(EachSum[Hessian]):
    """A sum of x xᵀ for each expert, and its number of tokens.

    Exact sums are a `Hessian` each. Others are one tensor, to which a GPU adds a batch in one launch, without a wait.
    Wide layers, of which a block has few, take a library's products.

    Args:
        experts: Their number.
        in_features: Width of their layers' input.
        device: Device of the sums; inputs must be there too.
        exact: See `Hessian`.
    """

    def __init__(self, experts: int, in_features: int, device: torch.device | str, *, exact: bool = True) -> None:
        super().__init__(Hessian, experts, in_features, device, exact)
        self._means: Tensor | None = None  # in the sums' place, once some are taken

    def add(self, x: Tensor, ends: Tensor) -> None:
        """Adds rows sorted by expert.

        Args:
            x: [rows, in].
            ends: Where the experts' rows end, int32 [experts]; rows behind the last end are no expert's.
        """
        counts = ends.diff(prepend=ends.new_zeros(1))
        if self._apart:
            add_each(self._apart, rows_of_each(x, counts))
            return
        with full_precision(x.device):
            self._tokens += counts
            if is_narrow(x) and self.in_features > _WIDE:
                for total, rows in zip(self._sums, rows_of_each(x.detach(), counts), strict=True):
                    add_products(total, rows)
            else:
                segment_sums(x).add_products(self._sums, x.detach(), ends)

    def take(self, experts: int, beside: Tensor | None = None, make_room: Callable[[], bool] = lambda: False) -> Tensor:
        """`Hessian.mean` of the next so many experts, [experts, in, in], in their order. Drops their sums.

        Args:
            experts: How many.
            beside: See `Hessian.mean`; the same in each call.
            make_room: As for `with_room`, for exact sums; means of others are in their place.
        """
        if self._apart:
            some, self._apart = self._apart[:experts], self._apart[experts:]
            return with_room(lambda: torch.stack([hessian.mean(beside) for hessian in some]), make_room)
        if self._means is None:
            weights = self._tokens
            self._means = mirror_passes(self._sums).symmetric_(self._sums)
            if beside is not None:
                self._means.add_(beside, alpha=self.in_features)
                weights = weights + self.in_features
            self._means /= weights.clamp(min=1)[:, None, None]
        start, self._taken = self._taken, self._taken + experts
        return self._means[start : self._taken]


def rows_of_each(x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """Each expert's rows of x, which come first there. Waits for the device."""
    sizes: list[int] = counts.tolist()
    return x[: sum(sizes)].split(sizes)
