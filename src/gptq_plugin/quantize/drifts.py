"""Drift of the layers' inputs, from the two walks of each batch: `Drifts`.

Tested by tests/quantize/test_asymmetric.py: with both walks.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from gptq_plugin.calibration.positions import Rows
from gptq_plugin.model.experts import experts_of
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target
from gptq_plugin.walk.drift import Drift
from gptq_plugin.walk.groups import Group

# The mean of (x − x̂)·x̂ to that of x̂·x̂. Noise that is as large as x gives -1/2, rows of other tokens about -1. On
# pycode-29m at 2 bits it is -0.05 at least.
_MOST = 0.5


def asks_for_drift(target: Target) -> bool:
    """True if a layer is to make up for its input's drift, and can: the float model has to walk for it."""
    return target.config.asymmetric_alpha > 0 and experts_of(target.name, target.module) is None


class Drifts:
    """Pairs the inputs of a group in both walks, call by call, and sums up their drift until the group is solved.

    An expert gets other tokens in the float model than in the quantized one, in an order of its own, so that its rows
    cannot be paired: its layers are rounded as they are.

    Args:
        plan: The layers.
        device: Where the sums live.
        exact: See `Drift`.
    """

    def __init__(self, plan: Plan, device: torch.device, exact: bool) -> None:
        self._device, self._exact = device, exact
        self._widths = {target.name: target.weight.shape[1] for target in plan.targets}
        self._wanted = {target.name for target in plan.targets if target.config.asymmetric_alpha}
        self._pairable = {target.name for target in plan.targets if asks_for_drift(target)}
        self._sums: dict[tuple[str, ...], Drift] = {}  # by the names of a group
        self._noted: dict[tuple[str, ...], dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def note(self, group: Group, number: int, x: Tensor) -> None:
        """Keeps the float model's input of a batch, [..., in], for `add`."""
        if self._pairs(group):
            self._noted[group.names][number].append(x.detach().clone())  # the model may overwrite it

    def add(self, group: Group, number: int, x: Tensor, rows: Rows) -> None:
        """Adds the drift of a batch's input x, [..., in], of which these rows count."""
        if not self._pairs(group):
            return
        drift, noted = self._of(group), self._noted[group.names][number]
        original = noted.pop(0) if noted else None
        if original is not None and original.shape == x.shape and original.dtype == x.dtype:
            flat = original.reshape(-1, x.shape[-1])
            drift.add(flat if rows.mask is None else flat[rows.mask], rows.counted)

    def mean(self, group: Group, hessian: Tensor, tokens: int) -> tuple[Tensor | None, tuple[str, ...]]:
        """The mean drift of a group's input over all ranks' tokens, and sentences for the report. Collective.

        Args:
            group: Forgotten afterwards.
            hessian: The group's, over all ranks.
            tokens: Those in the group's Hessian, over all ranks. One without a partner in the float walk counts as if
                it had not drifted.
        """
        if self._wanted.isdisjoint(group.names):
            return None, ()
        if not self._pairs(group):
            return None, ("asymmetric_alpha is not applied: an expert's tokens are others in the float model",)
        drift = self._of(group)
        self.discard(group)
        drift.over_ranks()
        mean, missing = drift.mean(tokens), tokens - drift.tokens
        if mean.trace() < -_MOST * hessian.trace():
            return None, ("asymmetric_alpha is not applied: its inputs have little to do with the float model's",)
        told = (f"{missing} of {tokens} tokens have no counterpart in the float model: taken as not drifted",)
        return mean, told[: missing > 0]

    def discard(self, group: Group) -> None:
        """Drops what is known of a group."""
        self._sums.pop(group.names, None)
        self._noted.pop(group.names, None)

    def _pairs(self, group: Group) -> bool:
        return not self._pairable.isdisjoint(group.names)

    def _of(self, group: Group) -> Drift:
        if group.names not in self._sums:
            self._sums[group.names] = Drift(self._widths[group.names[0]], self._device, exact=self._exact)
        return self._sums[group.names]
