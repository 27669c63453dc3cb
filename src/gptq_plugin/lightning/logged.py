"""What a `validation_step` logs, reduced over an epoch: `Logged`.

Tested by tests/lightning/test_validation.py: with what steps log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torchmetrics import Metric

from gptq_plugin import distributed
from gptq_plugin.training.paired import Measured
from gptq_plugin.training.samples import Chosen, Part, Samples

_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "min": torch.min,
    "max": torch.max,
    "sum": torch.sum,
}


@dataclass(frozen=True)
class Place:
    """A batch's number in its dataloader, that dataloader's, and whether there are several."""

    batch: int
    loader: int
    is_one_of_several: bool


@dataclass(frozen=True)
class _Value:
    """What one rank logged under one name.

    Attributes:
        value: Reduced over the rank's calls.
        parts: The values of these, for a mean.
        samples: What is known of the mean's samples.
    """

    value: float
    parts: list[Part] = field(default_factory=list)
    samples: Samples | None = None


@dataclass
class _Entry:
    """Values logged under one name.

    Attributes:
        reduce: Lightning's `reduce_fx`.
        names: Names under which the reduced value is returned.
        parts: The values of calls with a number.
        metric: The torchmetrics object, if one was logged; it accumulates by itself.
    """

    reduce: str | Callable[[Tensor], Tensor]
    names: list[str]
    parts: list[Part] = field(default_factory=list)
    metric: Metric | None = None

    def reduce_here(self) -> _Value:
        """This rank's value."""
        if self.metric is not None:
            value = float(self.metric.compute())  # over all ranks
            self.metric.reset()
            return _Value(value)
        if self.averages:
            return _Value(math.nan, self.parts)
        return _Value(self._reduced([float(part.value) for part in self.parts]))

    def reduce_over_ranks(self, values: list[_Value]) -> float:
        """The value over all ranks, from each one's. Their shares may differ in size."""
        if self.metric is not None:
            return values[0].value
        if self.averages:
            return Measured.over_ranks((one.parts, one.samples) for one in values)
        return self._reduced([one.value for one in values])

    @property
    def averages(self) -> bool:
        return self.metric is None and self.reduce in ("mean", torch.mean)

    def _reduced(self, values: list[float]) -> float:
        function = _REDUCE[self.reduce] if isinstance(self.reduce, str) else self.reduce
        return float(function(torch.tensor(values, dtype=torch.float64, device="cpu")))


class Logged:
    """Stands for a LightningModule's `log` and `log_dict`, and collects their values.

    Attributes:
        number: Of the batch that runs, among all of this rank.
    """

    def __init__(self) -> None:
        self.number = 0
        self._entries: dict[str, _Entry] = {}
        self._here: dict[str, _Value] = {}
        self._batch: Any = None
        self._suffix = ""
        self._key: int | None = None

    def set_batch(self, batch: Any, suffix: str, key: int | None) -> None:
        """Values logged from now on belong to this batch, which has this digest; their names get the suffix."""
        self._batch, self._suffix, self._key = batch, suffix, key

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        *_: Any,
        batch_size: int | None = None,
        add_dataloader_idx: bool = True,
        rank_zero_only: bool = False,
        **__: Any,
    ) -> None:
        """`LightningModule.log`, with those of its arguments that affect the value of the epoch."""
        if on_epoch is False or (rank_zero_only and distributed.rank() != 0):
            return
        suffix = self._suffix if add_dataloader_idx else ""
        names = [name + suffix] + ([f"{name}_epoch{suffix}"] if on_step else [])
        entry = self._entries.setdefault(names[0], _Entry(reduce_fx, names))
        if isinstance(value, Metric):
            entry.metric = value
            return
        given = torch.as_tensor(value, device="cpu").detach()
        if batch_size is None:
            batch_size = 1 if self._batch is None else extract_batch_size(self._batch)
        number = None if self._batch is None else self.number
        precision = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
        entry.parts.append(Part(float(given.float().mean()), batch_size, number, self._key, precision))

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def close(self) -> None:
        """Reduces what this rank logged: single samples that run later go into the same torchmetrics objects."""
        self._here = {name: entry.reduce_here() for name, entry in self._entries.items()}

    def values(self, chosen: Chosen[Place], single: Logged) -> dict[str, float]:
        """What rank 0 logged until `close`, each reduced over the ranks that logged it. The same on every rank.

        Args:
            chosen: The batches that were logged in, of which some ran sample by sample.
            single: What those samples logged. Its torchmetrics objects forget them.
        """
        here = dict(self._here)
        for name, entry in self._entries.items():
            if entry.averages:
                of_samples = single._entries.get(name)
                samples = chosen.samples(entry.parts, of_samples.parts if of_samples is not None else [])
                here[name] = _Value(math.nan, entry.parts, samples)
        for entry in single._entries.values():
            if entry.metric is not None:
                entry.metric.reset()
        ranks = distributed.gather_objects(here)
        values: dict[str, float] = {}
        for name, entry in self._entries.items():
            value = entry.reduce_over_ranks([parts[name] for parts in ranks if name in parts])
            values |= dict.fromkeys(entry.names, value)
        return dict(distributed.object_from_first(values))
