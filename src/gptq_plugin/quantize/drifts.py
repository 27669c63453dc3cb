"""Drift of the layers' inputs, from the two walks of each batch: `Drifts`.

Tested by tests/quantize/test_asymmetric.py: with both walks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from gptq_plugin.calibration.positions import Rows
from gptq_plugin.device.memory import with_room
from gptq_plugin.model.experts import experts_of
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target
from gptq_plugin.quantize.float_tokens import FloatTokens
from gptq_plugin.walk.drift import OTHER_TOKENS, Drift, judged, takes_outputs
from gptq_plugin.walk.groups import Group


def asks_for_drift(target: Target) -> bool:
    """True if a layer is to make up for its input's drift, and can: the float model has to walk for it."""
    return target.config.asymmetric_alpha > 0 and experts_of(target.name, target.module) is None


class Drifts:
    """Pairs the inputs of a group in both walks, call by call, and sums up their drift until the group is solved.

    An expert gets other tokens in the float model than in the quantized one. So the rows of its layers that read tokens
    are paired with what the float model gives its block for these; layers behind those are rounded as they are.

    A layer that reads its input alone, and has few outputs for that, gets the drift of its float outputs.

    Args:
        plan: The layers.
        device: Where the sums live.
        exact: See `Drift`.
        weight_of: The weight [out, in] that a layer runs with, on the device; called while its batches run.
        make_room: As for `with_room`; for the means.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        exact: bool,
        weight_of: Callable[[Target], Tensor],
        make_room: Callable[[], bool],
    ) -> None:
        self._device, self._exact, self._weight_of, self._make_room = device, exact, weight_of, make_room
        self._targets = {target.name: target for target in plan.targets}
        self._wanted = {target.name for target in plan.targets if target.config.asymmetric_alpha}
        self._experts = {target.name: experts_of(target.name, target.module) for target in plan.targets}
        self._tokens = FloatTokens()
        self._pairable = {target.name for target in plan.targets if asks_for_drift(target)}
        self._sums: dict[tuple[str, ...], Drift] = {}  # by the names of a group
        self._noted: dict[tuple[str, ...], dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def note(self, group: Group, number: int, x: Tensor) -> None:
        """Keeps the float model's input of a batch, [..., in], for `add`."""
        if self._pairs(group):
            self._noted[group.names][number].append(x.detach().clone())  # the model may overwrite it

    def add(self, group: Group, number: int, x: Tensor, rows: Rows) -> None:
        """Adds the drift of a batch's input x, [..., in], of which these rows count."""
        if not self.asked(group):
            return
        experts, flat = self._experts[group.names[0]], x.reshape(-1, x.shape[-1])
        if experts is not None:
            original = self._tokens.of_rows(experts, number, flat) if rows.are_tokens else None
        else:
            noted = self._noted[group.names][number]
            original = noted.pop(0) if noted else None
            same = original is not None and original.shape == x.shape and original.dtype == x.dtype
            original = original.reshape(flat.shape) if original is not None and same else None
        if original is not None:
            counted = original if rows.mask is None else original[rows.mask]
            first = self._targets[group.names[0]]
            weight = self._weight_of(first) if self._rows(group) else None
            self._of(group).add(rows.weighted(counted), rows.weighted(rows.counted), weight)

    def asked(self, group: Group) -> bool:
        """True if a layer of the group is to make up for drift."""
        return not self._wanted.isdisjoint(group.names)

    def of_tokens(self, group: Group, number: int, x: Tensor, rows: Rows) -> Tensor | None:
        """The float model's inputs, [counted rows, in], for tokens that experts read that are called at once.

        Args:
            group: The experts' layers.
            number: The batch's number.
            x: The experts' input, [rows, in].
            rows: Those that count.
        """
        experts = self._experts[group.names[0]]
        if experts is None or not rows.are_tokens or not self.asked(group):
            return None
        original = self._tokens.of_rows(experts, number, x)
        return original if original is None or rows.mask is None else original[rows.mask]

    def watching(self, sources: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Takes in what enters blocks of experts while batches run.

        Args:
            sources: By experts, the module whose input they get.
        """
        wanted = {self._experts[name] for name in self._wanted} if self._pairable else set()
        return self._tokens.watching({experts: module for experts, module in sources.items() if experts in wanted})

    def mean(self, group: Group, tokens: int, weight: int, *, paired: bool) -> tuple[Tensor | None, tuple[str, ...]]:
        """The mean drift of a group over all ranks' tokens, as `solver.solve` takes it, and sentences for the report.

        Collective.

        Args:
            group: Forgotten afterwards.
            tokens: Those of the group, over all ranks. One without a partner in the float walk counts as if it had
                not drifted.
            weight: Tokens in the group's Hessian, those of an expert's block included.
            paired: False for an expert's layer that reads no tokens.
        """
        if not self.asked(group):
            return None, ()
        if not paired:
            return None, (OTHER_TOKENS,)
        drift = self._of(group)
        self.discard(group)
        drift.over_ranks()
        is_usable, told = judged(drift.along(), tokens, drift.tokens)
        return with_room(partial(drift.mean, weight), self._make_room) if is_usable else None, told

    def discard(self, group: Group) -> None:
        """Drops what is known of a group."""
        self._sums.pop(group.names, None)
        self._noted.pop(group.names, None)

    def leave(self, experts: str) -> None:
        """Drops what entered a block of experts."""
        self._tokens.leave(experts)

    def _pairs(self, group: Group) -> bool:
        return not self._pairable.isdisjoint(group.names)

    def _of(self, group: Group) -> Drift:
        if group.names not in self._sums:
            width, rows = self._targets[group.names[0]].shape[1], self._rows(group)
            self._sums[group.names] = Drift(width, self._device, exact=self._exact, rows=rows)
        return self._sums[group.names]

    def _rows(self, group: Group) -> int:
        """Outputs of a group whose drift is summed up; 0 if it is its input's."""
        rows, width = self._targets[group.names[0]].shape
        return rows if len(group.names) == 1 and takes_outputs(rows, width) else 0
