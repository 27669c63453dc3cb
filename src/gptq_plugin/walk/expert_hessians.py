"""Hessians of experts, most of which see few tokens: what all tokens of their layer say is weighted in.

A Hessian of n tokens says nothing of the directions those do not have, and GPTQ pushes errors there. Measured on a
trained model's layers, with the tokens of one cluster for the expert's (`scripts/BENCHMARKS.md`), the errors on tokens
that calibration did not see, in parts of round-to-nearest's at n = in / 4: 0.67 to 1.35 with the expert's tokens alone.
So

- layers that read tokens take as many tokens of the whole layer as they have inputs, d, beside their own:
  H = (Σ own x xᵀ + d · mean of all) / (n + d). At n = d / 4 that leaves 0.32 to 0.61, and at n = 4 d it does no harm.
- layers behind those read what only this expert makes of its tokens, so all that is known of other tokens is that they
  are others: damp_percent is at least 0.3 (d / n)^1.5. At n = d / 4 that leaves 0.69 to 0.81.
- layers that no token reached take all tokens of the layer, or, behind those, are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.walk.hessian import Hessian

_DAMPING = 0.3
_MOST = 0.9


@dataclass(frozen=True)
class Evidence:
    """What a layer is solved with.

    Attributes:
        mean: Of x xᵀ, [in, in].
        tokens: Of the layer's own, over all ranks.
        damp_percent: At least so much damping.
        deviations: What is to be reported.
    """

    mean: Tensor
    tokens: int
    damp_percent: float = 0.0
    deviations: tuple[str, ...] = ()


class ExpertHessians:
    """The tokens that went into each block of experts, until the walk has left it.

    Args:
        device: Where the Hessians live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Hessian] = {}
        self._means: dict[str, Tensor] = {}  # over all ranks, of the experts the walk is in
        self._read_tokens: dict[tuple[str, str], bool] = {}  # by experts and the layer's name in one of them

    def entered(self, experts: str, rows: Tensor) -> None:
        """Counts rows [tokens, in] that go into the block."""
        if experts not in self._sums:
            self._sums[experts] = Hessian(rows.shape[1], self._device)
        self._sums[experts].add(rows)

    def reads_tokens(self, experts: str, layers: Sequence[str], do: bool) -> bool:
        """Whether layers of these names, which read the same, read tokens, as any rank saw it. The first time, all
        ranks meet."""
        if (experts, layers[0]) not in self._read_tokens:
            self._read_tokens.update(dict.fromkeys(((experts, n) for n in layers), any(distributed.gather_objects(do))))
        return self._read_tokens[experts, layers[0]]

    def weighted(self, experts: str, reads_tokens: bool, own: Hessian) -> Evidence:
        """What a layer of these experts is solved with. All ranks call it, with the sum over ranks."""
        width, tokens = len(own.sum), own.tokens
        few = f"only {tokens} calibration tokens were routed to this expert, for {width} inputs"
        whole = self._whole(experts) if reads_tokens else None
        if whole is not None and len(whole) == width:
            mean = (own.mean() * tokens + whole * width) / (tokens + width)
            said = (f"{few}: all tokens of the layer are weighted in",) if tokens < width else ()
            return Evidence(mean, tokens, 0.0, said)
        damp_percent = min(_MOST, _DAMPING * (width / max(1, tokens)) ** 1.5)
        said = (f"{few}: damp_percent is {damp_percent:.2g}",) if tokens < width else ()
        return Evidence(own.mean(), tokens, damp_percent, said)

    def leave(self, experts: str) -> None:
        """Forgets what went into the block."""
        self._means.pop(experts, None)
        self._sums.pop(experts, None)

    def _whole(self, experts: str) -> Tensor | None:
        if experts not in self._means:
            sums = self._sums.pop(experts, None)
            width = max(distributed.gather_objects(len(sums.sum) if sums is not None else 0))
            if not width:
                return None
            sums = sums or Hessian(width, self._device)
            sums.over_ranks()
            self._means[experts] = sums.mean()
        return self._means[experts]
