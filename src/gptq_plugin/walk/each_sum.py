"""Running sums over the tokens of each of several experts: `EachSum`, what Hessians and drifts have in common.

Tested by tests/walk/test_each_drift.py: with the sums of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_plugin import distributed


class EachSum:
    """A sum for each expert, and its number of tokens, in one tensor each.

    Args:
        experts: Their number.
        in_features: Width of their layers' input.
        shape: Of an expert's sum.
        device: Device of the sums; inputs must be there too.
        exact: Sums are in float64, in which products are added exactly (`plain_sums` of the kernels).
    """

    def __init__(
        self, experts: int, in_features: int, shape: tuple[int, ...], device: torch.device | str, exact: bool
    ) -> None:
        self.in_features = in_features
        self._exact = exact
        dtype = torch.float64 if exact else torch.float32
        self._sums = torch.zeros(experts, *shape, dtype=dtype, device=device)
        self._tokens = torch.zeros(experts, dtype=torch.int64, device=device)
        self._taken = 0

    def over_ranks(self) -> None:
        """Adds up the sums and the tokens of all ranks, on every rank."""
        distributed.sum_each_(self._of_ranks())

    def tokens(self) -> Tensor:
        """The number of tokens of each expert, int64 [experts], on the device. To be called before `take`."""
        return self._tokens

    def _of_ranks(self) -> tuple[Tensor, ...]:
        """What is added up over ranks."""
        return self._sums, self._tokens

    def _next(self, experts: int) -> slice:
        """The next so many experts to be taken."""
        start, self._taken = self._taken, self._taken + experts
        return slice(start, self._taken)
