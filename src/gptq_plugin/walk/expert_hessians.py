"""Hessians of experts, most of which see few tokens: tokens of the whole block are weighted in.

A Hessian of n tokens holds nothing about directions those tokens lack, and GPTQ pushes errors there. Measured on
layers of a trained model, with the tokens of one cluster as the expert's (docs/benchmarks/few-tokens.md): with
n = d / 4 tokens for d inputs and the expert's tokens alone, the error on tokens that calibration did not see is .32 to
1.06 of round-to-nearest's. Therefore

- layers that read tokens take d tokens of the whole block beside their n own:
  H = (Σ own x xᵀ + d · mean of all) / (n + d). At n = d / 4 that leaves .24 to .36, and at n = 4 d it does no harm.
- layers behind those read outputs that only this expert computes, so the block's other tokens cannot help:
  damp_percent is at least 0.3 (d / n)^1.5. At n = d / 4 that leaves .22 to .70.
- layers that no token reached take all tokens of the block, or, behind those, are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.device.memory import with_room
from gptq_plugin.device.streams import AsyncRead
from gptq_plugin.walk.drift import OTHER_TOKENS, judged
from gptq_plugin.walk.each_drift import EachDrift
from gptq_plugin.walk.each_hessian import EachHessian
from gptq_plugin.walk.hessian import Hessian

_DAMPING = 0.3
_MOST = 0.9  # damp_percent must stay below 1
_Number = TypeVar("_Number", float, Tensor)


@dataclass(frozen=True)
class Evidence:
    """The Hessian a layer is solved with, and how far it can be trusted.

    Attributes:
        mean: Mean of x xᵀ, [in, in].
        tokens: Number of the layer's own tokens, over all ranks.
        damp_percent: Least damping to solve with.
        drift: C, or W·C, as `solver.solve` takes it; None for a target that is the weight itself.
        deviations: Sentences for the report.
    """

    mean: Tensor
    tokens: int
    damp_percent: float = 0.0
    deviations: tuple[str, ...] = ()
    drift: Tensor | None = None

    def to(self, device: torch.device) -> Evidence:
        """The evidence on a device."""
        drift = None if self.drift is None else self.drift.to(device)
        return replace(self, mean=self.mean.to(device), drift=drift)


class ExpertHessians:
    """Sums up the tokens that enter each block of experts, until the walk has left it.

    Args:
        device: Device of the Hessians.
        exact: See `Hessian`.
        make_room: As for `with_room`; for means.
    """

    def __init__(self, device: torch.device, exact: bool = True, make_room: Callable[[], bool] = lambda: False) -> None:
        self._device, self._exact, self._make_room = device, exact, make_room
        self._sums: dict[str, Hessian] = {}
        self._means: dict[str, Tensor] = {}  # by block the walk is in, over all ranks
        self._read_tokens: dict[tuple[str, str], bool] = {}  # by block and the layer's name in one expert

    def entered(self, experts: str, rows: Tensor) -> None:
        """Counts rows, [tokens, in], that enter the block."""
        if experts not in self._sums:
            self._sums[experts] = Hessian(rows.shape[1], self._device, exact=self._exact)
        self._sums[experts].add(rows)

    def reads_tokens(self, experts: str, layers: Sequence[str], do: bool) -> bool:
        """True if these layers read the block's tokens, rather than outputs of its other layers.

        Collective the first time it is asked about a layer.

        Args:
            experts: Name of the block.
            layers: Names in one expert of layers that read the same input.
            do: True if this rank saw them read tokens; one rank suffices.
        """
        if (experts, layers[0]) not in self._read_tokens:
            self._read_tokens.update(dict.fromkeys(((experts, n) for n in layers), any(distributed.gather_objects(do))))
        return self._read_tokens[experts, layers[0]]

    def weighted(self, experts: str, reads_tokens: bool, own: Hessian) -> Evidence:
        """The evidence for a layer of these experts. Collective.

        Args:
            experts: Name of the block.
            reads_tokens: See `reads_tokens`.
            own: The layer's Hessian, summed over ranks.
        """
        beside = self._beside(experts, reads_tokens, own.in_features)
        mean = with_room(partial(own.mean, beside), self._make_room)
        return _evidence(mean, own.tokens, helped=beside is not None)

    def weighted_each(
        self,
        experts: str,
        reads_tokens: bool,
        own: EachHessian,
        drift: EachDrift | None = None,
        wanted: Sequence[bool] = (),
    ) -> EachEvidence:
        """`weighted` for layers of all of these experts. Collective.

        Args:
            experts: As there.
            reads_tokens: As there.
            own: The layers' Hessians, summed over ranks.
            drift: Their drifts, likewise, if they are paired with the float model's inputs.
            wanted: Of each expert, whether its layers are to make up for drift; empty if none are.
        """
        beside = self._beside(experts, reads_tokens, own.in_features)
        return EachEvidence(own, beside, drift, wanted, self._make_room)

    def leave(self, experts: str) -> None:
        """Forgets the tokens of the block."""
        self._means.pop(experts, None)
        self._sums.pop(experts, None)

    def _beside(self, experts: str, reads_tokens: bool, width: int) -> Tensor | None:
        """The mean that is weighted in for layers with so many inputs; None if there is none."""
        whole = self._whole(experts) if reads_tokens else None
        return whole if whole is not None and len(whole) == width else None

    def _whole(self, experts: str) -> Tensor | None:
        """Mean of x xᵀ over all tokens of the block and all ranks; None if there were none."""
        if experts not in self._means:
            sums = self._sums.pop(experts, None)
            width = max(distributed.gather_objects(sums.in_features if sums is not None else 0))
            if not width:
                return None
            sums = sums or Hessian(width, self._device, exact=self._exact)
            sums.over_ranks()
            self._means[experts] = with_room(sums.mean, self._make_room)
        return self._means[experts]


class EachEvidence:
    """The evidence for layers of several experts, which is taken in their order, some at a time.

    Args:
        own: The layers' Hessians.
        beside: What is weighted in; None if nothing is.
        drift: As for `ExpertHessians.weighted_each`.
        wanted: Likewise.
        make_room: As for `with_room`.
    """

    def __init__(
        self,
        own: EachHessian,
        beside: Tensor | None,
        drift: EachDrift | None = None,
        wanted: Sequence[bool] = (),
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self._own, self._beside, self._drift, self._wanted = own, beside, drift, wanted
        self._make_room = make_room
        self._tokens = own.tokens()
        self._read = AsyncRead(self._tokens)
        self._paired = _Paired.of(drift) if drift is not None else None
        self._taken = 0

    def take(self, experts: int) -> SomeEvidence:
        """That of the next so many experts."""
        some = slice(self._taken, self._taken + experts)
        self._taken = some.stop
        means, helped = self._own.take(experts, self._beside, self._make_room), self._beside is not None
        tokens = self._tokens[some]
        damp_percents = tokens.new_zeros(experts, dtype=torch.float64)
        if not helped:
            shortage = self._own.in_features / tokens.double().clamp(min=1)
            damp_percents = _damping(shortage).clamp(max=_MOST)
        drifts = None
        if self._drift is not None and self._paired is not None:
            weights = tokens + self._own.in_features
            drifts = self._drift.take(self._paired.along[some], weights, self._make_room)

        def each() -> list[Evidence]:
            own = zip(means, self._read.get()[some], strict=True)
            found = [_evidence(mean, tokens, helped=helped) for mean, tokens in own]
            return [
                self._with_drift(one, some.start + number, None if drifts is None else drifts[number])
                for number, one in enumerate(found)
            ]

        return SomeEvidence(means, damp_percents, drifts, each)

    def _with_drift(self, evidence: Evidence, expert: int, drift: Tensor | None) -> Evidence:
        if not evidence.tokens or not self._wanted or not self._wanted[expert]:
            return evidence
        if self._paired is None:
            return replace(evidence, deviations=(*evidence.deviations, OTHER_TOKENS))
        along, paired = self._paired.read.get()
        is_usable, told = judged(along[expert], evidence.tokens, int(paired[expert]))
        return replace(evidence, drift=drift if is_usable else None, deviations=evidence.deviations + told)


@dataclass(frozen=True)
class _Paired:
    """What is told of experts' drifts.

    Attributes:
        along: See `EachDrift.along`.
        read: That and the tokens, float64 [2, experts], on their way from the device.
    """

    along: Tensor
    read: AsyncRead

    @staticmethod
    def of(drift: EachDrift) -> _Paired:
        along = drift.along()
        return _Paired(along, AsyncRead(torch.stack([along.double(), drift.tokens().double()])))


@dataclass(frozen=True)
class SomeEvidence:
    """The evidence for layers of some experts, whose tokens may still be on their way from the device.

    Attributes:
        means: [experts, in, in].
        damp_percents: As in `Evidence`, float64 [experts], on the device.
        drifts: C of each, [experts, in, in], 0 where none is to be made up for; None if that holds for all.
        each: Returns that of each; waits for the device.
    """

    means: Tensor
    damp_percents: Tensor
    drifts: Tensor | None
    each: Callable[[], list[Evidence]]


def _evidence(mean: Tensor, tokens: int, *, helped: bool) -> Evidence:
    """What is made of a mean over an expert's tokens, in which others are weighted where they help."""
    width = len(mean)
    few = f"only {tokens} calibration tokens were routed to this expert, for {width} inputs"
    damp_percent = 0.0 if helped else min(_MOST, _damping(width / max(1, tokens)))
    remedy = "all tokens of the layer are weighted in" if helped else f"damp_percent is {damp_percent:.2g}"
    return Evidence(mean, tokens, damp_percent, (f"{few}: {remedy}",) if tokens < width else ())


def _damping(shortage: _Number) -> _Number:
    """The damp_percent of an expert alone, by how many inputs it has for each of its tokens."""
    return _DAMPING * shortage**1.5
