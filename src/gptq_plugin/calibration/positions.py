"""Selects the positions of a calibration batch that enter a Hessian: all but padding, or those in the loss."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gptq_plugin.calibration.batches import fields_of, is_token_labels, labels_of
from gptq_plugin.calibration.collect import IGNORED_LABEL, Batch, is_mask, masks_in
from gptq_plugin.calibration.routed_tokens import EVERY_ROW, Mask, RoutedTokens
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.hf_models import is_encoder_decoder, predicts_next, transformers_models

_running: ContextVar[int | None] = ContextVar("number of the calibration batch that runs on this thread", default=None)
_UNKNOWN_TOKENS = "gets rows that are not tokens of its block's input: all of them counted, padding included"


class Rows(NamedTuple):
    """The rows of a layer's input that count.

    Attributes:
        counted: [rows, in].
        remark: A sentence for the report, or None.
        are_tokens: For a layer of an expert: the rows are tokens of the block's input, not the expert's intermediates.
    """

    counted: Tensor
    remark: str | None
    are_tokens: bool = False


class Positions:
    """Takes each batch's masks from the call of the transformers model, whatever the batch's layout.

    With ``token_weighting="labels"`` the labels come from that call too or, if it has none (calibration leaves out a
    decoder's loss), from the batch. Label i + 1 belongs to position i if the model's loss shifts labels
    (`hf_models.predicts_next`), else label i. An encoder's input has no labels: all of it but padding counts.

    Args:
        model: The model that the batches run through.
        batches: The batches by number.
        token_weighting: As in QuantizeConfig.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], token_weighting: str):
        self._root = model
        self._batches = batches
        self._by_labels = token_weighting == "labels"
        self._masks: dict[int, tuple[Tensor, ...]] = {}
        self._in_batch: set[int] = set()  # batches whose labels come from the batch
        self._without: set[int] = set()  # batches without a position that counts
        self._one_length: set[int] = set()  # batches with sources as long as their targets
        self._routed = RoutedTokens(model)

    @contextlib.contextmanager
    def watching(self, entered: Callable[[str, Tensor], None] = lambda experts, rows: None) -> Iterator[None]:
        """Reads masks while batches run inside the block.

        Args:
            entered: See `RoutedTokens.watching`.
        """

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = _running.get()
            if number is not None:
                bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
                self._read(number, module, {**kwargs, **bound})

        handles = [
            model.register_forward_pre_hook(watch, with_kwargs=True) for _, model in transformers_models(self._root)
        ]
        try:
            with self._routed.watching(_running.get, self._mask_of, entered):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def runs(self, number: int) -> None:
        """Marks batch `number` as running on this thread; called before its forward."""
        _running.set(number)

    def rows(self, number: int, layer: str, x: Tensor) -> Rows:
        """The rows of a layer's input that count, by `Batch.counted`; an expert's, by the tokens routed to it.

        Raises:
            CalibrationError: token_weighting is "labels", and the batch has none.
        """
        if self._by_labels and number not in self._masks:  # no transformers model has been called yet
            models = [model for _, model in transformers_models(self._root)]
            model = models[0] if len(models) == 1 else self._root
            self._read(number, model, fields_of(self._batches[number].data) or {})
        batch, masks = self._batches[number], self._masks.get(number)
        if not self._routed.is_expert(layer):
            return Rows(*batch.counted(x, masks))
        rows = x.reshape(-1, x.shape[-1])
        kept, are_tokens = self._routed.counted(number, layer, rows)
        if kept is None:
            kept = self._mask_of(number, rows)  # every token, with a weight that may be 0
        if isinstance(kept, Tensor):
            return Rows(rows[kept], None, are_tokens)
        return Rows(rows, _UNKNOWN_TOKENS if kept is None else None, are_tokens)

    def _mask_of(self, number: int, x: Tensor) -> Mask:
        batch = self._batches[number]
        masks = self._masks.get(number, batch.masks)
        return batch.mask_of(x, masks) if masks else EVERY_ROW

    def check(self) -> None:
        """Refuses batches without labels if labels are read from batches.

        Raises:
            CalibrationError: A batch has no labels.
        """
        for number, batch in enumerate(self._batches):
            if self._in_batch and labels_of(batch.data) is None:
                raise CalibrationError(_no_labels(number))

    def notes(self) -> dict[str, int]:
        """Number of batches for each remark."""
        notes = {
            "hold no label that counts (all are -100): none of their positions enters a Hessian": self._without,
            "have sources as long as their targets, which cannot be told apart by shape: "
            "the sources' attention mask is used for both": self._one_length,
        }
        return {note: len(numbers) for note, numbers in notes.items()}

    def _read(self, number: int, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        if not self._by_labels:
            masks = masks_in(arguments)
            if masks is not None:
                self._masks[number] = masks
            return
        labels = arguments.get("labels")
        if not is_token_labels(labels):
            labels = labels_of(self._batches[number].data)
            self._in_batch.add(number)
        if labels is None:
            raise CalibrationError(_no_labels(number))
        masks = _counted_by_loss(model, arguments, labels)
        self._masks[number] = masks
        if not masks[-1].any():
            self._without.add(number)
        if len(masks) == 2 and masks[0].shape == masks[1].shape:
            self._one_length.add(number)


def _counted_by_loss(model: nn.Module, arguments: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, ...]:
    """Masks of counted positions, bool [samples, positions] each: an encoder's, if there is one, then the labels'."""
    counts = labels != IGNORED_LABEL
    if predicts_next(model):
        counts = pad(counts[:, 1:], (0, 1), value=False)
    two = is_encoder_decoder(model)
    padding = arguments.get("decoder_attention_mask" if two else "attention_mask")
    if is_mask(padding) and padding.shape == counts.shape:
        counts = counts & padding.bool().to(counts.device)
    if not two:
        return (counts,)
    source, ids = arguments.get("attention_mask"), arguments.get("input_ids")
    if is_mask(source):
        return source.bool(), counts
    return (torch.ones_like(ids, dtype=torch.bool), counts) if is_mask(ids) else (counts,)


def _no_labels(number: int) -> str:
    return (
        f"token_weighting='labels' counts the positions whose label is not {IGNORED_LABEL}, and calibration batch "
        f"{number} has no labels [samples, positions]: give batches with a field `labels`, or a calibration_step "
        "that passes labels=... to the transformers model, or leave token_weighting at 'all'"
    )
