"""The running sums of (x − x̂) x̂ᵀ over the tokens of each of several experts: `EachDrift`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gptq_plugin.device.memory import with_room
from gptq_plugin.device.precision import full_precision
from gptq_plugin.kernels import segment_sums
from gptq_plugin.kernels.plain_segments import rows_of_each
from gptq_plugin.walk.drift import MOST, add_exactly
from gptq_plugin.walk.each_sum import EachSum
from gptq_plugin.walk.hessian import is_narrow


class EachDrift(EachSum):
    """A `Drift` for each expert, in one tensor. A GPU adds a batch in 16 bits in a few launches, without a wait.

    Args:
        experts: Their number.
        in_features: Width of their layers' input.
        device: Device of the sums; inputs must be there too.
        exact: See `Drift`, whose sums those of each are.
    """

    def __init__(self, experts: int, in_features: int, device: torch.device | str, *, exact: bool = True) -> None:
        super().__init__(experts, in_features, (in_features, in_features), device, exact)
        self._powers = torch.zeros(experts, dtype=torch.float64, device=device)  # sums of x̂·x̂

    def add(self, x: Tensor, seen: Tensor, ends: Tensor) -> None:
        """Adds rows sorted by expert, as `Drift.add` adds those of one.

        Args:
            x: Of the float model, [rows, in]; overwritten.
            seen: Of the quantized model, likewise.
            ends: Where the experts' rows end, int32 [experts]; rows behind the last end are no expert's.
        """
        seen = seen.detach() if is_narrow(seen) else seen.detach().float()
        with full_precision(x.device):
            self._tokens += ends.diff(prepend=ends.new_zeros(1))
            away, passes = x.to(seen.dtype).sub_(seen), segment_sums(seen)
            self._powers += passes.squares(seen, ends).sum(1)
            if not self._exact:
                passes.add_cross_products(self._sums, away, seen, ends)
            elif is_narrow(seen) or not seen.is_cuda:
                passes.add_exact_cross_products(self._sums, away, seen, ends)
            else:
                each = zip(self._sums, rows_of_each(away, ends), rows_of_each(seen, ends), strict=True)
                for total, own, own_seen in each:
                    add_exactly(total, own, own_seen)

    def along(self) -> Tensor:
        """`Drift.along` of each expert, of all tokens, float64 [experts], on the device. To be called before `take`."""
        along = self._sums.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
        return torch.where(self._powers > 0, along / self._powers, 0)

    def take(self, along: Tensor, weights: Tensor, make_room: Callable[[], bool] = lambda: False) -> Tensor:
        """The sums of the next experts, [experts, in, in] in float32, in their order.

        Args:
            along: Those of `along`; a drift that has little to do with its inputs becomes 0.
            weights: By which sums are divided, [experts]; none is 0.
            make_room: As for `EachHessian.take`.
        """
        sums, weights = self._sums[self._next(len(weights))], weights[:, None, None]
        means = with_room(partial(_narrowed, sums, weights), make_room) if self._exact else sums.div_(weights)
        return means.masked_fill_((along < -MOST)[:, None, None], 0)

    def _of_ranks(self) -> tuple[Tensor, ...]:
        return *super()._of_ranks(), self._powers


def _narrowed(sums: Tensor, weights: Tensor) -> Tensor:
    return torch.div(sums, weights, out=torch.empty_like(sums, dtype=torch.float32))
