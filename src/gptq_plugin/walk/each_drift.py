"""The running sums of (x − x̂) x̂ᵀ over the tokens of each of several experts: `EachDrift`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptq_plugin.device.memory import with_room
from gptq_plugin.device.precision import full_precision
from gptq_plugin.kernels import segment_sums
from gptq_plugin.walk.drift import MOST, Drift
from gptq_plugin.walk.each_hessian import rows_of_each
from gptq_plugin.walk.each_sum import EachSum
from gptq_plugin.walk.hessian import is_narrow


class EachDrift(EachSum[Drift]):
    """A `Drift` for each expert.

    Exact sums are a `Drift` each. Others are one tensor, to which a GPU adds a batch in one launch, without a wait.

    Args:
        experts: Their number.
        in_features: Width of their layers' input.
        device: Device of the sums; inputs must be there too.
        exact: See `Drift`.
    """

    def __init__(self, experts: int, in_features: int, device: torch.device | str, *, exact: bool = True) -> None:
        super().__init__(Drift, experts, in_features, device, exact)
        self._powers = torch.zeros(len(self._sums), dtype=torch.float32, device=device)  # sums of x̂·x̂

    def add(self, x: Tensor, seen: Tensor, ends: Tensor) -> None:
        """Adds rows sorted by expert, as `Drift.add` adds those of one.

        Args:
            x: Of the float model, [rows, in]; overwritten.
            seen: Of the quantized model, likewise.
            ends: Where the experts' rows end, int32 [experts]; rows behind the last end are no expert's.
        """
        counts = ends.diff(prepend=ends.new_zeros(1))
        if self._apart:
            each = zip(self._apart, rows_of_each(x, counts), rows_of_each(seen, counts), strict=True)
            for drift, own, own_seen in each:
                drift.add(own, own_seen)
            return
        with full_precision(x.device):
            self._tokens += counts
            seen = seen.detach() if is_narrow(seen) else seen.detach().float()
            away = x.to(seen.dtype).sub_(seen)
            segment_sums(seen).add_cross_products(self._sums, away, seen, ends)
            squares = torch.linalg.vector_norm(seen, dim=1, dtype=torch.float32).square_()
            expert = torch.searchsorted(ends, torch.arange(len(seen), device=ends.device, dtype=ends.dtype), right=True)
            self._powers += squares.new_zeros(len(ends) + 1).index_add_(0, expert, squares)[:-1]

    def along(self) -> Tensor:
        """`Drift.along` of each expert, [experts], on the device. To be called before `take`."""
        if self._apart:
            along, powers = torch.stack([drift.sampled for drift in self._apart], 1)
        else:
            along, powers = self._sums.diagonal(dim1=1, dim2=2).sum(1), self._powers
        return torch.where(powers > 0, along / powers, 0)

    def take(self, along: Tensor, weights: Tensor, make_room: Callable[[], bool] = lambda: False) -> Tensor:
        """The sums of the next experts, [experts, in, in] in float32, in their order. Drops them.

        Args:
            along: Those of `along`; a drift that has little to do with its inputs becomes 0.
            weights: By which sums are divided, [experts].
            make_room: As for `EachHessian.take`.
        """
        start, self._taken = self._taken, self._taken + len(weights)
        weights = weights.clamp(min=1)[:, None, None]
        if self._apart:
            some, self._apart = self._apart[: len(weights)], self._apart[len(weights) :]
            means = with_room(lambda: torch.stack([drift.total for drift in some]).div_(weights).float(), make_room)
        else:
            means = self._sums[start : self._taken].div_(weights)
        return means.masked_fill_((along < -MOST)[:, None, None], 0)

    def _together(self) -> tuple[Tensor, ...]:
        return *super()._together(), self._powers
