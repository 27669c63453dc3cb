"""Running sums over the tokens of each of several experts: `EachSum`, what Hessians and drifts have in common.

Tested by tests/walk/test_each_drift.py: with the sums of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.device.streams import on_device


class Sum(Protocol):
    """The sum of one expert."""

    tokens: int

    def over_ranks(self) -> None:
        """Adds up the sums and the tokens of all ranks, on every rank."""
        ...


S = TypeVar("S", bound=Sum)


class EachSum(Generic[S]):
    """A sum for each expert, and its number of tokens: exact ones apart, others in one tensor.

    Args:
        kind: Makes the exact sum of an expert, of a width and on a device.
        experts: Their number.
        in_features: Width of their layers' input.
        device: Device of the sums; inputs must be there too.
        exact: Has a sum of that kind for each.
    """

    def __init__(
        self,
        kind: Callable[[int, torch.device | str], S],
        experts: int,
        in_features: int,
        device: torch.device | str,
        exact: bool,
    ) -> None:
        self.in_features = in_features
        self._apart = [kind(in_features, device) for _ in range(experts if exact else 0)]
        together = 0 if exact else experts
        self._sums = torch.zeros(together, in_features, in_features, dtype=torch.float32, device=device)
        self._tokens = torch.zeros(together, dtype=torch.int64, device=device)
        self._taken = 0

    def over_ranks(self) -> None:
        """Adds up the sums and the tokens of all ranks, on every rank."""
        for one in self._apart:
            one.over_ranks()
        for sums in self._together() if len(self._sums) else ():
            distributed.sum_(sums)

    def tokens(self) -> Tensor:
        """The number of tokens of each expert, int64 [experts], on the device. To be called before `take`."""
        return on_device([one.tokens for one in self._apart], self._tokens) if self._apart else self._tokens

    def _together(self) -> tuple[Tensor, ...]:
        """What is summed for all experts together."""
        return self._sums, self._tokens
