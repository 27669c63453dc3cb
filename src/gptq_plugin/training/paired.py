"""Metrics that know the values they are means of, and how far their change can be trusted: a paired bootstrap.

Both models are measured on the same batches (or sequences). These are drawn again and again, as many as there are, with
replacement; in each draw both models have the same ones, so that what is hard for both does not count. Means of few
values vary less in such draws than they would in new data; as Hesterberg ("What Teachers Should Know About the
Bootstrap", 2015, the expanded percentile interval) proposes, deviations are widened by Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from gptq_plugin.report.spread import Spread

FEWEST = 10  # parts, of which a bootstrap tells something
_DRAWS = 4000
_AT_ONCE = 2**22  # values that are drawn together
_CENTRAL = 0.95


class Measured(float):
    """A metric's value, the mean of others.

    Attributes:
        values: One for each part of the data, in order.
        weights: Of these in the mean.
        keys: What tells parts apart (`batches.digest`); None if only their order does.
    """

    values: Sequence[float]
    weights: Sequence[float]
    keys: Sequence[int] | None

    @classmethod
    def mean(cls, values: Sequence[float], weights: Sequence[float], keys: Sequence[int] | None = None) -> Measured:
        """The weighted mean of at least one value."""
        total = math.fsum(weights)
        mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else math.nan
        made = cls(mean)
        made.values, made.weights, made.keys = values, weights, keys
        return made


def unpaired(before: float, after: float) -> str:
    """Why a metric's change has no known spread, in words; empty if it has."""
    if not isinstance(before, Measured) or not isinstance(after, Measured):
        return "it is no mean of values that are logged for each batch"
    if len(before.values) < FEWEST:
        return f"it is measured on {len(before.values)} batches, and fewer than {FEWEST} tell too little"
    if not same_parts(before, after):
        return "the two models were measured on different batches (a dataloader that shuffles, or augments)"
    return "" if all(map(math.isfinite, (*before.values, *after.values))) else "not all its values are finite"


def same_parts(before: Measured, after: Measured) -> bool:
    """True if both were measured on the same parts of the data, as far as their keys tell."""
    return list(before.weights) == list(after.weights) and before.keys == after.keys


@dataclass(frozen=True)
class Draws:
    """The two models' means in every draw.

    Attributes:
        before, after: float64 [draws], on the CPU.
        parts: Number of parts that were drawn from.
    """

    before: Tensor
    after: Tensor
    parts: int

    @classmethod
    def of(cls, before: Measured, after: Measured) -> Draws:
        """Draws from two metrics' values, for which `unpaired` is empty; the same at every call."""
        columns = torch.tensor([before.values, after.values, before.weights], dtype=torch.float64, device="cpu")
        weighted = torch.stack([columns[0] * columns[2], columns[1] * columns[2], columns[2]])
        sums = torch.cat([weighted[:, drawn].sum(-1) for drawn in _drawn(len(before.values))], dim=1)
        return cls(sums[0] / sums[2], sums[1] / sums[2], len(before.values))

    def bound(self, of_draws: Tensor, of_all: float, confidence: float) -> float:
        """Upper bound of a statistic, which it keeps with that confidence.

        Args:
            of_draws: The statistic in each draw, float64 [draws].
            of_all: The statistic of all parts.
            confidence: Between 0 and 1; below a half it is a lower bound.
        """
        return of_all + (float(of_draws.quantile(confidence)) - of_all) * _widening(confidence, self.parts)


def spread(before: float, after: float) -> Spread | None:
    """How well the change is known; None if that cannot be told."""
    if unpaired(before, after):
        return None
    assert isinstance(before, Measured) and isinstance(after, Measured)
    draws = Draws.of(before, after)
    low, high = (1 - _CENTRAL) / 2, (1 + _CENTRAL) / 2
    change = draws.after - draws.before
    shares = change / draws.before.abs()
    known = bool(before) and bool(shares.isfinite().all())
    least, most = (draws.bound(change, after - before, side) for side in (low, high))
    smallest, largest = (
        draws.bound(shares, (after - before) / abs(before), side) if known else math.nan for side in (low, high)
    )
    return Spread(least, most, smallest, largest, draws.parts)


def _drawn(parts: int) -> Iterator[Tensor]:
    """Yields indices, int64 [draws, parts]."""
    generator = torch.Generator("cpu").manual_seed(0)
    at_once = max(1, _AT_ONCE // parts)
    for first in range(0, _DRAWS, at_once):
        rows = min(at_once, _DRAWS - first)
        yield torch.randint(parts, (rows, parts), generator=generator, device="cpu")


def _widening(confidence: float, parts: int) -> float:
    """Student's quantile over the normal one, and the sample's deviation over that of the draws."""
    z, free = NormalDist().inv_cdf(confidence), parts - 1
    if z == 0:
        return 1.0
    # Cornish and Fisher's expansion, to 0.1 % from 9 degrees of freedom on.
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return t / z * math.sqrt(parts / free)
