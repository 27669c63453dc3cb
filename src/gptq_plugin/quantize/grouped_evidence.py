"""Evidence for experts that are called at once: `GroupedEvidence`.

Tested by tests/quantize/test_experts_pass.py: with the layers that are made of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gptq_plugin.calibration.positions import Rows
from gptq_plugin.model.experts_at_once import Grouped
from gptq_plugin.walk.each_drift import EachDrift
from gptq_plugin.walk.each_hessian import EachHessian
from gptq_plugin.walk.groups import Group
from gptq_plugin.walk.ranges import Ranges


class GroupedEvidence:
    """Hessians and drifts of groups of experts until they are taken.

    Args:
        calls: The experts' calls, by name.
        device: Where the sums live.
        exact: See `Hessian`.
        ranges: Gets the inputs' ranges.
    """

    def __init__(self, calls: Mapping[str, Grouped], device: torch.device, exact: bool, ranges: Ranges) -> None:
        self._calls = calls
        self._device, self._exact = device, exact
        self._ranges = ranges
        self._hessians: dict[tuple[str, ...], EachHessian] = {}  # by the names of a group
        self._drifts: dict[tuple[str, ...], EachDrift] = {}

    def add(self, group: Group, rows: Rows, x: Tensor, original: Tensor | None = None) -> None:
        """Adds a batch's input of a group, sorted by expert.

        Args:
            group: The group.
            rows: Those that count.
            x: The input, [rows, in].
            original: The float model's, [counted rows, in], if it is known and asked for; overwritten.
        """
        ends = self._calls[group.at_once[0]].call.ends_of(x)
        counted = _counted(ends, rows.mask)
        self._of(group, x.shape[1]).add(rows.weighted(rows.counted), counted)
        if original is not None:
            self._drift_of(group, x.shape[1]).add(original, rows.counted, counted)
        for name in group.at_once:
            self._ranges.read_experts(self._calls[name].layers, x, ends)

    def take(self, group: Group, width: int) -> EachHessian:
        """The Hessians over all ranks, which are kept no longer. Collective.

        Args:
            group: The group.
            width: Its layers' inputs.
        """
        hessians = self._of(group, width)
        del self._hessians[group.names]
        hessians.over_ranks()
        return hessians

    def take_drift(self, group: Group, width: int) -> EachDrift:
        """`take` of the drifts."""
        drift = self._drift_of(group, width)
        del self._drifts[group.names]
        drift.over_ranks()
        return drift

    def discard(self, group: Group) -> None:
        """Drops what was observed of a group."""
        self._hessians.pop(group.names, None)
        self._drifts.pop(group.names, None)

    def _of(self, group: Group, width: int) -> EachHessian:
        if group.names not in self._hessians:
            self._hessians[group.names] = EachHessian(self._count(group), width, self._device, exact=self._exact)
        return self._hessians[group.names]

    def _drift_of(self, group: Group, width: int) -> EachDrift:
        if group.names not in self._drifts:
            self._drifts[group.names] = EachDrift(self._count(group), width, self._device, exact=self._exact)
        return self._drifts[group.names]

    def _count(self, group: Group) -> int:
        return len(self._calls[group.at_once[0]].layers)


def _counted(ends: Tensor, mask: Tensor | None) -> Tensor:
    """Where experts' rows end among those that count."""
    if mask is None:
        return ends
    sums = torch.nn.functional.pad(mask.cumsum(0, dtype=torch.int32), (1, 0))
    return sums[ends.long()]
