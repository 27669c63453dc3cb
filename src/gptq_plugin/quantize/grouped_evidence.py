"""Evidence for experts that are called at once: `GroupedEvidence`.

Tested by tests/quantize/test_experts_pass.py: with the layers that are made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gptq_plugin.calibration.positions import Rows
from gptq_plugin.model.experts_at_once import Grouped
from gptq_plugin.walk.groups import Group
from gptq_plugin.walk.hessian import Hessian, add_each
from gptq_plugin.walk.ranges import Ranges


class GroupedEvidence:
    """Hessians of groups of experts, one for each expert, until they are taken.

    Args:
        calls: The experts' calls, by name.
        device: Where the Hessians live.
        exact: See `Hessian`.
        ranges: Gets the inputs' ranges.
    """

    def __init__(self, calls: Mapping[str, Grouped], device: torch.device, exact: bool, ranges: Ranges) -> None:
        self._calls = calls
        self._device, self._exact = device, exact
        self._ranges = ranges
        self._hessians: dict[tuple[str, ...], list[Hessian]] = {}  # by the names of a group, and by expert

    def add(self, group: Group, rows: Rows, x: Tensor) -> None:
        """Adds a batch's input of a group, [rows, in], sorted by expert, of which `rows` count."""
        ends = self._calls[group.at_once[0]].call.ends_of(x)
        counts = _counts(ends, rows.mask)
        parts = rows.weighted(rows.counted)[: sum(counts)].split(counts)
        add_each(self._of(group, x.shape[1]), parts)
        for name in group.at_once:
            self._ranges.read_experts(self._calls[name].layers, x, ends)

    def take(self, group: Group, width: int) -> Iterator[Hessian]:
        """Yields each expert's Hessian over all ranks, and drops it. Collective.

        Args:
            group: The group.
            width: Its layers' inputs.
        """
        hessians = list(self._of(group, width))
        del self._hessians[group.names]
        for hessian in hessians:
            hessian.over_ranks()
        while hessians:
            yield hessians.pop(0)

    def discard(self, group: Group) -> None:
        """Drops what was observed of a group."""
        self._hessians.pop(group.names, None)

    def _of(self, group: Group, width: int) -> Sequence[Hessian]:
        if group.names not in self._hessians:
            experts = len(self._calls[group.at_once[0]].layers)
            self._hessians[group.names] = [Hessian(width, self._device, exact=self._exact) for _ in range(experts)]
        return self._hessians[group.names]


def _counts(ends: Tensor, mask: Tensor | None) -> list[int]:
    """How many of each expert's rows count. Waits for the device, once for all of them."""
    if mask is not None:
        sums = torch.nn.functional.pad(mask.cumsum(0, dtype=torch.int64), (1, 0))
        ends = sums[ends.long()]
    counts: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return counts
