"""The running sums of x xᵀ over the tokens of each of several experts: `EachHessian`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gptq_plugin.device.memory import with_room
from gptq_plugin.device.precision import full_precision
from gptq_plugin.kernels import mirror_passes, segment_sums
from gptq_plugin.kernels.plain_segments import WIDTH, rows_of_each
from gptq_plugin.kernels.strips import Strips
from gptq_plugin.walk.each_sum import EachSum
from gptq_plugin.walk.hessian import add_exactly, add_products, is_narrow, strips_on, whole

_WIDE = 4096  # inputs


class EachHessian(EachSum):
    """A sum of x xᵀ for each expert, and its number of tokens.

    A GPU adds a batch in 16 bits to all of them in a launch or two, without a wait. Wide layers, of which a block has
    few, take a library's products, and so do exact sums of float32 on a GPU: expert by expert.

    Args:
        experts: Their number.
        in_features: Width of their layers' input.
        device: Device of the sums; inputs must be there too.
        exact: See `Hessian`.
    """

    def __init__(self, experts: int, in_features: int, device: torch.device | str, *, exact: bool = True) -> None:
        self._strips = Strips(in_features, WIDTH) if in_features <= _WIDE else strips_on(device, in_features)
        shape = (self._strips.size,) if exact else (in_features, in_features)
        super().__init__(experts, in_features, shape, device, exact)
        self._means: Tensor | None = None  # in the place of sums that are not exact, once some are taken

    def add(self, x: Tensor, ends: Tensor) -> None:
        """Adds rows sorted by expert.

        Args:
            x: [rows, in].
            ends: Where the experts' rows end, int32 [experts]; rows behind the last end are no expert's.
        """
        x = x.detach()
        with full_precision(x.device):
            self._tokens += ends.diff(prepend=ends.new_zeros(1))
            if self._exact:
                self._add_exactly(x, ends)
            elif is_narrow(x) and self.in_features > _WIDE:
                for total, rows in zip(self._sums, rows_of_each(x, ends), strict=True):
                    add_products(total, rows)
            else:
                segment_sums(x).add_products(self._sums, x, ends)

    def _add_exactly(self, x: Tensor, ends: Tensor) -> None:
        if self.in_features <= _WIDE and (is_narrow(x) or not x.is_cuda):
            segment_sums(x).add_exact_products(self._sums, x, ends)
            return
        for total, rows in zip(self._sums, rows_of_each(x, ends), strict=True):
            add_exactly(total, self._strips, rows)

    def take(self, experts: int, beside: Tensor | None = None, make_room: Callable[[], bool] = lambda: False) -> Tensor:
        """`Hessian.mean` of the next so many experts, [experts, in, in], in their order.

        Args:
            experts: How many.
            beside: See `Hessian.mean`; the same in each call.
            make_room: As for `with_room`, for exact sums; means of others are in their place.
        """
        some = self._next(experts)
        if self._exact:
            return with_room(partial(self._exact_means, some, beside), make_room)
        if self._means is None:
            weights = self._tokens
            self._means = mirror_passes(self._sums).symmetric_(self._sums)
            if beside is not None:
                self._means.add_(beside, alpha=self.in_features)
                weights = weights + self.in_features
            self._means /= weights.clamp(min=1)[:, None, None]
        return self._means[some]

    def _exact_means(self, some: slice, beside: Tensor | None) -> Tensor:
        n, tokens = self.in_features, self._tokens[some, None, None]
        means = whole(self._sums[some], self._strips, tokens.clamp(min=1), torch.float32)
        return means if beside is None else means.mul_(tokens).add_(beside * n).div_(tokens + n)
