"""Turns texts, tokens or a dataloader's batches into calibration batches with masks of the positions that count.

Texts and single token lists become rows without padding: samples of equal length share a batch. Ready batches (a
dataloader's) are left unchanged; their attention mask marks padding, which never enters a Hessian. Data may come from
several sources, each with a name for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import Tensor
from torch.utils.data import DataLoader

from gptq_plugin.calibration import same_batches
from gptq_plugin.calibration.batches import digest, fields_of, sample_count
from gptq_plugin.calibration.given import items_of
from gptq_plugin.calibration.items import Items, is_empty, stacked
from gptq_plugin.calibration.same_batches import Taken
from gptq_plugin.calibration.sources import Source, Sources
from gptq_plugin.calibration.takes import Takes
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError

# Masks over positions, in the order they are tried against a layer's input.
_MASK_KEYS = ("attention_mask", "decoder_attention_mask")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """The samples of one forward.

    Attributes:
        data: The forward's input.
        masks: bool [samples, positions] each, True for positions that count; empty if all do.
        samples: Number of samples.
    """

    data: Any
    masks: tuple[Tensor, ...] = ()
    samples: int = 1

    @property
    def tokens(self) -> int | None:
        """Number of positions that count; None if unknown."""
        if self.masks:
            return int(self.masks[0].sum())
        ids = (fields_of(self.data) or {}).get("input_ids")
        return ids.numel() if isinstance(ids, Tensor) else None

    def counted(self, x: Tensor, masks: tuple[Tensor, ...] | None = None) -> tuple[Tensor, str | None]:
        """Selects the rows of a layer's input that count.

        Args:
            x: [..., in], the layer's input.
            masks: The masks the model was called with; the batch's own if None.

        Returns:
            [rows, in], and a sentence for the report if no mask could be applied, else None.
        """
        masks = self.masks if masks is None else masks
        rows = x.reshape(-1, x.shape[-1])
        if not masks:
            return rows, None
        mask = self.mask_of(x, masks)
        if mask is not None:
            return rows[mask], None
        if x.dim() == 2 and rows.shape[0] != self.samples:
            return rows, "gets rows that cannot be matched to the attention mask or labels: all of them counted"
        return rows, "reads a sequence that the attention mask or labels do not describe: all its positions counted"

    def mask_of(self, x: Tensor, masks: tuple[Tensor, ...] | None = None) -> Tensor | None:
        """The rows of x [..., in] that count, bool [rows], by the first mask of matching shape; None without one."""
        rows = x.shape[:-1].numel()
        for mask in self.masks if masks is None else masks:
            mask = mask.to(x.device)
            if x.shape[:-1] == mask.shape or (x.shape[0] == mask.shape[0] and rows == mask.numel()):
                return mask.reshape(-1)
            if x.shape[:-1] == mask.T.shape:  # sequence first
                return mask.T.reshape(-1)
            if x.dim() == 2 and rows == mask.numel():
                return mask.reshape(-1)
        return None


@dataclass
class Calibration:
    """Collected calibration data.

    Attributes:
        batches: This rank's, in the order they run.
        numbers: Of each of them, its place among the batches of all ranks.
        of_all_ranks: Number of batches on all ranks.
        deviations: A sentence for each difference from the request, such as dropped samples.
        sources: Number of samples by the name of their source; empty if unknown.
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

    Raises:
        CalibrationError: `data` is a single text or none at all, texts come without a tokenizer or a chat template
            that they need, token ids are no whole numbers, or kinds are mixed.
    """

    def items() -> Items:
        return Items(tokenizer, config.model_seqlen, Takes() if takes is None else takes)

    if isinstance(data, Sources):
        return _join([(part, _collect(part, config, items(), alone)) for part in data.parts])
    whole = Source(data, "", config.nsamples if nsamples is None else nsamples)
    return _collect(whole, config, items(), alone)


def _collect(source: Source, config: QuantizeConfig, items: Items, alone: bool) -> Calibration:
    batches, own = _take(source, config, items)
    taken: Taken = own
    numbers: Sequence[int] = range(len(batches))
    if not (alone or source.is_shared):
        taken, numbers = same_batches.over_ranks(own)
        if taken.sizes:
            batches = (batches or _batches(own.samples, 1))[: len(numbers)]
    total = len(taken.sizes)
    if taken.samples or source.is_shared:
        batches = batches or _batches(taken.samples, config.batch_size)
        total = len(batches)
        numbers = range(total) if alone else same_batches.mine(total)
        batches = [batches[number] for number in numbers]
    deviations = taken.deviations()
    if taken.stopped and not source.is_general:  # general data is often endless
        deviations.append(taken.unused())
    return Calibration(batches, list(numbers), total, deviations, first_batches=[0] if batches else [])


def _take(source: Source, config: QuantizeConfig, items: Items) -> tuple[list[Batch], Taken]:
    """Reads the source up to its number of samples."""
    data = items_of(source.data, config.batch_size)
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
        if sample is None:
            batches.append(ready_batch(batch))
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
    parts = fields_of(data)
    masks = masks_in(parts) if parts is not None else None
    return Batch(data, masks or (), sample_count(data))


def masks_in(arguments: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
    """Reads the masks of positions that count from a model's keyword arguments.

    Returns:
        bool [samples, positions] each; empty if all positions count; None if there is no mask.
    """
    given = (arguments.get(key) for key in _MASK_KEYS)
    masks = [mask.bool() for mask in given if is_mask(mask)]
    if not masks:
        return None
    labels = arguments.get("labels")
    if is_mask(labels) and all(labels.shape != mask.shape for mask in masks):
        masks.append(labels != IGNORED_LABEL)  # an encoder-decoder's second sequence
    return () if all(bool(mask.all()) for mask in masks) else tuple(masks)


def is_mask(value: Any) -> TypeGuard[Tensor]:
    """True for a tensor [samples, positions]."""
    return isinstance(value, Tensor) and value.dim() == 2


def _batches(samples: Sequence[Any], batch_size: int) -> list[Batch]:
    return [ready_batch(data) for data in stacked(samples, batch_size)]


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
