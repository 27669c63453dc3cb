"""Turns texts, tokens or a dataloader's batches into calibration batches.

Texts and single token lists become rows without padding: samples of equal length share a batch. Ready batches (a
dataloader's) are left unchanged; their attention mask marks padding, which never enters a Hessian. Data may come from
several sources, each with a name for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from gptq_plugin.calibration import same_batches
from gptq_plugin.calibration.batches import digest, fields_of, leaves, sample_count, with_own_tensors
from gptq_plugin.calibration.dataset_name import dataset_name
from gptq_plugin.calibration.given import items_of
from gptq_plugin.calibration.items import Items, is_empty, stacked
from gptq_plugin.calibration.mask_values import kept_positions
from gptq_plugin.calibration.same_batches import Taken
from gptq_plugin.calibration.sources import Source, Sources
from gptq_plugin.calibration.takes import Takes
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError

# The places of so many samples, of all ranks, each once, in parts: the same on every rank.
Order = Callable[[int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Batch:
    """The samples of one forward.

    Attributes:
        data: The forward's input.
        samples: Number of samples.
        given_apart: They were given (or chosen) one by one and stacked: more of their kind may run with them, or fewer.
        is_chosen: Their number is ours: users gave one by one, or a dataset of them.
    """

    data: Any
    samples: int = 1
    given_apart: bool = False
    is_chosen: bool = False

    @property
    def tokens(self) -> int | None:
        """Number of tokens but for padding; None if unknown."""
        parts = fields_of(self.data) or {}
        ids, mask = parts.get("input_ids"), parts.get("attention_mask")
        kept = kept_positions(mask, False) if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if kept is not None:
            return int(kept.sum())
        return ids.numel() if isinstance(ids, Tensor) else None

    @property
    def positions(self) -> int | None:
        """Number of positions of its longest sequences of whole numbers, padding too; None without token ids."""
        if not isinstance((fields_of(self.data) or {}).get("input_ids"), Tensor):
            return None
        tensors = [value for _, value in leaves(self.data) if isinstance(value, Tensor) and value.dim() <= 2]
        return max((value.numel() for value in tensors if not value.is_floating_point()), default=None)


@dataclass
class Calibration:
    """Collected calibration data.

    Attributes:
        batches: This rank's, in the order they run.
        numbers: Of each of them, its place among the batches of all ranks.
        of_all_ranks: Number of batches on all ranks.
        deviations: A sentence for each difference from the request, such as dropped samples.
        sources: Number of samples by the name of their source (of data given by itself, `dataset_name`); empty if
            unknown.
        first_batches: Indices of each source's first batch, which represents the others.
    """

    batches: list[Batch] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    of_all_ranks: int = 0
    deviations: list[str] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    first_batches: list[int] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(batch.samples for batch in self.batches)

    @property
    def most_samples(self) -> int:
        """The samples of the batch that has most; 0 without batches."""
        return max((batch.samples for batch in self.batches), default=0)

    @property
    def digest(self) -> int:
        """Sum of the batches' `batches.digest`; the sums of several ranks add up to that of all samples."""
        return sum(digest(batch.data) for batch in self.batches)


def collect(
    data: Iterable[Any],
    config: QuantizeConfig,
    tokenizer: Callable[..., Any] | None = None,
    nsamples: int | None = None,
    *,
    alone: bool = False,
    takes: Takes | None = None,
    order: Order | None = None,
) -> Calibration:
    """Turns the user's data into batches. In a process group every rank calls it.

    Args:
        data: An iterable of texts, of rows with a text or a chat (see `text_rows.encoded`); of token samples (lists of
            ids, 1-D tensors, or dicts of them, as a tokenizer returns); of rows of numbers (1-D tensors, with targets
            or without; one tensor of rows too); or of ready batches (dicts, tensors, tuples of tensors, or anything
            the model's forward takes). Of one kind, except in `Sources`. On several ranks, this rank's part: see
            `same_batches`.
        config: `model_seqlen` limits the length of token samples, `batch_size` the number in a batch.
        tokenizer: Required for texts; called as tokenizer(text). Chats need its chat template.
        nsamples: Largest number of samples to use, from the first; `config.nsamples` if None.
        alone: Nothing is exchanged with other ranks: the batches are those of this rank's part.
        takes: What the model takes: other fields of token samples are left out, and positions beyond its own.
        order: Of samples, before they are put into batches, none of which has samples of two parts; None leaves them as
            they are. Ready batches stay.

    Raises:
        CalibrationError: `data` is a single text or none at all, texts come without a tokenizer or a chat template
            that they need, token ids are no whole numbers, or kinds are mixed.
    """

    def items() -> Items:
        return Items(tokenizer, config.model_seqlen, Takes() if takes is None else takes)

    if isinstance(data, Sources):
        return _join([(part, _collect(part, config, items(), alone, order)) for part in data.parts])
    whole = Source(data, "", config.nsamples if nsamples is None else nsamples)
    collected = _collect(whole, config, items(), alone, order)
    name = dataset_name(data.dataset if isinstance(data, DataLoader) else data)
    return replace(collected, sources={name: collected.samples} if name else {})


def _collect(source: Source, config: QuantizeConfig, items: Items, alone: bool, order: Order | None) -> Calibration:
    batches, own = _take(source, config, items)
    taken: Taken = own
    numbers: Sequence[int] = range(len(batches))
    if not (alone or source.is_shared):
        taken, numbers = same_batches.over_ranks(own)
        if taken.sizes:
            batches = (batches or _batches(own.samples, 1))[: len(numbers)]
    count, total = len(taken.samples), len(taken.sizes)
    if taken.samples or source.is_shared:
        parts = [range(count)] if order is None else order(count)
        batches = batches or [
            batch for part in parts for batch in _batches([taken.samples[n] for n in part], config.collected_batch_size)
        ]
        total = len(batches)
        numbers = range(total) if alone else same_batches.mine(total)
        batches = [batches[number] for number in numbers]
    deviations = taken.deviations()
    if taken.stopped and not source.is_general:  # general data is often endless
        deviations.append(taken.unused())
    if source.is_stream and not taken.read:
        deviations.append(
            f"{source.name} has nothing left, as it goes on where training left it: give calibration=..., the texts, "
            "batches or DataLoader to use"
        )
    return Calibration(batches, list(numbers), total, deviations, first_batches=[0] if batches else [])


def _take(source: Source, config: QuantizeConfig, items: Items) -> tuple[list[Batch], Taken]:
    """Reads the source up to its number of samples."""
    data = items_of(source.data, config.collected_batch_size)
    is_made = not isinstance(data, (list, tuple, Tensor))
    labels_itself = source.is_general and config.token_weighting == "labels"
    batches: list[Batch] = []
    samples: list[Any] = []
    dropped = count = 0
    more = False
    for item in data:
        if count >= source.nsamples:
            more = True
            break
        # After batches a mapping is a batch too: a loader's last batch may hold a single sample.
        is_batch = bool(batches) and isinstance(item, Mapping)
        sample, batch = items.read(item, is_batch=is_batch, rows=not (source.is_stream or isinstance(data, DataLoader)))
        if is_made:
            sample, batch = with_own_tensors(sample), with_own_tensors(batch)
        if sample is None:
            number = 1 if source.is_single else sample_count(batch)
            is_chosen = source.is_chosen or (isinstance(data, tuple) and data is not source.data)  # split by `items_of`
            batches.append(Batch(batch, number, given_apart=source.is_stacked, is_chosen=is_chosen))
            count += batches[-1].samples
        elif is_empty(sample):
            dropped += 1
        else:
            if labels_itself and isinstance(sample, dict) and "input_ids" in sample:
                sample.setdefault("labels", sample["input_ids"])
            samples.append(sample)
            count += 1
        if samples and batches:
            raise CalibrationError("calibration data mixes single samples with batches: give one kind")
    sizes, read = [batch.samples for batch in batches], dropped + len(samples) + len(batches)
    return batches, Taken(samples, sizes, source.nsamples, dropped, read, _length(data), more, items.notes)


def _join(parts: list[tuple[Source, Calibration]]) -> Calibration:
    joined = Calibration()
    for source, part in parts:
        joined.first_batches += [len(joined.batches) + number for number in part.first_batches]
        joined.batches += part.batches
        joined.numbers += [joined.of_all_ranks + number for number in part.numbers]
        joined.of_all_ranks += part.of_all_ranks
        joined.deviations += part.deviations
        joined.sources[source.name] = joined.sources.get(source.name, 0) + part.samples
    return joined


def ready_batch(data: Any) -> Batch:
    """Wraps data that the forward takes unchanged."""
    return Batch(data, sample_count(data))


def _batches(samples: Sequence[Any], batch_size: int) -> list[Batch]:
    return [replace(ready_batch(data), given_apart=True, is_chosen=True) for data in stacked(samples, batch_size)]


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
