"""Metrics that know the values they are means of, and how far their change can be trusted: a paired bootstrap.

Both models are measured on the same samples (or batches, where a metric is no mean over samples: `samples`). These
are drawn again and again, as many as there are, with replacement; in each draw both models have the same ones, so that
what is hard for both does not count. A mean in which some weigh more, such as one over tokens, is a ratio of two sums:
each draw has its own weights below the line. Means of few values vary less in such draws than they would in new data;
as Hesterberg ("What Teachers Should Know About the Bootstrap", 2015, the expanded percentile interval) proposes,
deviations are widened by Student's t. Where not all samples were run on their own, deviations are those of a mean of
all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.report.spread import Spread
from gptq_plugin.training.samples import Part, Samples

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
        samples: If the parts are batches, what is known of their samples; else None.
    """

    values: Sequence[float]
    weights: Sequence[float]
    keys: Sequence[int] | None
    samples: Samples | None

    @classmethod
    def mean(
        cls,
        values: Sequence[float],
        weights: Sequence[float],
        keys: Sequence[int] | None = None,
        samples: Samples | None = None,
    ) -> Measured:
        """The weighted mean of at least one value."""
        total = math.fsum(weights)
        mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else math.nan
        made = cls(mean)
        made.values, made.weights, made.keys, made.samples = values, weights, keys, samples
        return made

    @classmethod
    def over_ranks(cls, ranks: Iterable[tuple[Sequence[Part], Samples | None]]) -> float:
        """The mean over the parts of all ranks, of each with what it knows of their samples.

        It is a plain number where a part belongs to no batch, or there are none.
        """
        ranks = list(ranks)
        parts = [part for own, _ in ranks for part in own]
        if not parts:
            return math.nan
        keys = [part.key for part in parts if part.key is not None]
        known = [samples for _, samples in ranks if samples is not None]
        samples = Samples.over_ranks(known) if known else None
        mean = cls.mean([float(part.value) for part in parts], [part.weight for part in parts], keys, samples)
        return mean if len(keys) == len(parts) else float(mean)


@dataclass(frozen=True)
class Pairs:
    """What a bootstrap draws: the parts of the data with both models' values.

    Attributes:
        before, after: The models' values.
        weights: Of the parts.
        unit: What a part is, "samples" or "batches".
        why: Why parts are not samples, in words; empty if they are.
        share: Of all parts, those that are here.
    """

    before: Sequence[float]
    after: Sequence[float]
    weights: Sequence[float]
    unit: str
    why: str = ""
    share: float = 1.0

    @classmethod
    def of(cls, before: Measured, after: Measured) -> Pairs:
        """The samples of two metrics with the `same_parts`, or their batches, if those tell none."""
        one, two = before.samples, after.samples
        if one is None or two is None:
            return cls(before.values, after.values, before.weights, "samples")
        why = one.why or two.why
        names = [name for name in one.names() if name in two.names()]
        if not why and names:
            both = {batch.place for batch in one.batches} & {batch.place for batch in two.batches}
            chosen = [[batch for batch in of.batches if batch.place in both] for of in (one, two)]
            first, second = ([part for batch in batches for part in batch.parts(names[0])] for batches in chosen)
            if [part[1:] for part in first] == [part[1:] for part in second]:
                values = [part[0] for part in first], [part[0] for part in second], [part[1] for part in first]
                ran = sum(len(batch.values) for batch in chosen[0])  # those that weigh nothing too
                return cls(*values, "samples", share=ran / one.total)
            why = "the two models' samples differ"
        why = why or (one if not one.names() else two).unfit()
        return cls(before.values, after.values, before.weights, "batches", why)

    @property
    def unpaired(self) -> str:
        """Why they tell nothing, in words; empty if they do."""
        if len(self.before) < FEWEST:
            because = f" ({self.why})" if self.why else ""
            return f"it is measured on {len(self.before)} {self.unit}{because}, and fewer than {FEWEST} tell too little"
        return "" if all(map(math.isfinite, (*self.before, *self.after))) else "not all its values are finite"


def unpaired(before: float, after: float) -> str:
    """Why a metric's change has no known spread, in words; empty if it has."""
    if not isinstance(before, Measured) or not isinstance(after, Measured):
        return "it is no mean of values that are logged for each batch"
    if not same_parts(before, after):
        return "the two models were measured on different batches (a dataloader that shuffles, or augments)"
    return Pairs.of(before, after).unpaired


def same_parts(before: Measured, after: Measured) -> bool:
    """True if both were measured on the same parts of the data, as far as their keys tell."""
    return list(before.weights) == list(after.weights) and before.keys == after.keys


@dataclass(frozen=True)
class Draws:
    """The two models' means in every draw.

    Attributes:
        before, after: float64 [draws], on the CPU.
        pairs: What was drawn from.
        metrics: The two models' metrics.
    """

    before: Tensor
    after: Tensor
    pairs: Pairs
    metrics: tuple[float, float]

    @classmethod
    def of(cls, before: Measured, after: Measured) -> Draws:
        """Draws from two metrics' values, for which `unpaired` is empty; the same at every call."""
        pairs = Pairs.of(before, after)
        weighted = _weighted(pairs)
        sums = torch.cat([weighted[:, drawn].sum(-1) for drawn in _drawn(len(pairs.before))], dim=1)
        return cls(sums[0] / sums[2], sums[1] / sums[2], pairs, (float(before), float(after)))

    def bound(self, statistic: Callable[[Any, Any], Any], confidence: float) -> float:
        """Upper bound of a statistic, which it keeps with that confidence.

        Args:
            statistic: Of the models' means, numbers or float64 [draws].
            confidence: Between 0 and 1; below a half it is a lower bound.
        """
        parts = len(self.pairs.before)
        sums = _weighted(self.pairs).sum(-1)
        of_parts = float(statistic(sums[0] / sums[2], sums[1] / sums[2]))
        deviation = float(statistic(self.before, self.after).quantile(confidence)) - of_parts
        return float(statistic(*self.metrics)) + deviation * _widening(confidence, parts) * math.sqrt(self.pairs.share)


def spread(before: float, after: float) -> Spread | None:
    """How well the change is known; None if that cannot be told."""
    if unpaired(before, after):
        return None
    assert isinstance(before, Measured) and isinstance(after, Measured)
    draws = Draws.of(before, after)
    sides = (1 - _CENTRAL) / 2, (1 + _CENTRAL) / 2
    known = bool(before) and bool(_share(draws.before, draws.after).isfinite().all())
    least, most = (draws.bound(lambda old, new: new - old, side) for side in sides)
    smallest, largest = (draws.bound(_share, side) if known else math.nan for side in sides)
    pairs = draws.pairs
    return Spread(least, most, smallest, largest, len(pairs.before), pairs.unit, pairs.why)


def _share(before: Any, after: Any) -> Any:
    return (after - before) / abs(before)


def _weighted(pairs: Pairs) -> Tensor:
    """float64 [3, parts]: both models' values by their weights, and these."""
    columns = torch.tensor([pairs.before, pairs.after, pairs.weights], dtype=torch.float64, device="cpu")
    return torch.stack([columns[0] * columns[2], columns[1] * columns[2], columns[2]])


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
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return t / z * math.sqrt(parts / free)
