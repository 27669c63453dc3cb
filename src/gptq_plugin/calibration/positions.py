"""Selects the positions of a calibration batch that enter a Hessian: all but padding, or those in the loss."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import fields_of, is_token_labels, labels_of
from gptq_plugin.calibration.collect import Batch
from gptq_plugin.calibration.layouts import fitting, rows_in
from gptq_plugin.calibration.mask_calls import Key, watch_calls, with_masks
from gptq_plugin.calibration.routed_tokens import EVERY_ROW, Mask, RoutedTokens
from gptq_plugin.calibration.sequences import (
    IGNORED_LABEL,
    TARGETS,
    arguments_of,
    in_the_loss,
    masks_among,
    sequences_in,
    writes_targets,
)
from gptq_plugin.calibration.verdicts import UNSEEN, Findings, Rule
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.hf_models import predicts_next, transformers_models

_running: ContextVar[int | None] = ContextVar("number of the calibration batch that runs on this thread", default=None)
_UNKNOWN_TOKENS = "gets rows that are not tokens of its block's input: all of them counted, padding included"
_UNMATCHED = "gets rows that cannot be matched to the attention mask or labels: all of them counted"
_UNDESCRIBED = "reads a sequence that the attention mask or labels do not describe: all its positions counted"


class Rows(NamedTuple):
    """The rows of a layer's input that count.

    Attributes:
        counted: [rows, in].
        remark: A sentence for the report, or None.
        are_tokens: For a layer of an expert: the rows are tokens of the block's input, not the expert's intermediates.
        mask: bool [all rows of the input], those that count; None if all do.
        roots: The square roots of their weights, float32 [rows]; None if all weigh the same.
    """

    counted: Tensor
    remark: str | None
    are_tokens: bool = False
    mask: Tensor | None = None
    roots: Tensor | None = None

    def weighted(self, rows: Tensor) -> Tensor:
        """Rows like `counted`, [rows, in], each times the root of its weight: in float32 at least, if they have any."""
        if self.roots is None:
            return rows
        return rows.to(torch.promote_types(rows.dtype, torch.float32)) * self.roots[:, None]


class _Kept(NamedTuple):
    """What counts of a sequence: bool [samples, positions], and whether that is all of it."""

    mask: Tensor
    is_whole: bool

    @classmethod
    def of(cls, mask: Tensor) -> _Kept:
        return cls(mask, bool(mask.all()))


class Positions:
    """Takes each batch's masks from the calls of the model's modules, and applies what was found of layers.

    With ``token_weighting="labels"`` the labels come from that call too or, if it has none (calibration leaves out a
    decoder's loss), from the batch. Label i + 1 belongs to position i if the model's loss shifts labels
    (`hf_models.predicts_next`), else label i. An encoder's input has no labels: all of it but padding counts.

    Args:
        model: The model that the batches run through.
        batches: The batches by number.
        token_weighting: As in QuantizeConfig.

    Attributes:
        findings: What was observed of masks and layers (`learn`). Before, sizes tell of which sequence a layer's rows
            are.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], token_weighting: str):
        self.findings = Findings()
        self._root = model
        self._batches = batches
        self._by_labels = token_weighting == "labels"
        self._kept: dict[int, dict[Key, _Kept]] = {}  # by batch
        self._rules: dict[str, tuple[Rule, ...]] = {}  # by layer
        self._counts: dict[int, Tensor] = {}  # by batch, what the loss looks at
        self._calls: Counter[tuple[int, str]] = Counter()
        self._hiding: set[Key] = set()
        self._reads_batches = False  # whether labels were taken from a batch, not from a model's call
        self._without: set[int] = set()  # batches without a position that counts
        self._has_targets = any(writes_targets(one) for _, one in transformers_models(model))
        self._routed = RoutedTokens(model)

    @contextlib.contextmanager
    def watching(self, entered: Callable[[str, Tensor], None] = lambda experts, rows: None) -> Iterator[None]:
        """Reads masks while batches run inside the block.

        Args:
            entered: See `RoutedTokens.watching`.
        """

        def visit(name: str, module: nn.Module, arguments: dict[str, Tensor]) -> None:
            number = _running.get()
            if number is not None:
                self._read(number, name, module, arguments)

        names = ("", *dict(transformers_models(self._root)), *(name for name, _ in self.findings.masks))
        modules = {name: self._root.get_submodule(name) for name in names}
        with watch_calls(modules, visit), self._routed.watching(_running.get, self._mask_of, entered):
            yield

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks of experts and modules around them, whose input is matched with masks too."""
        return self._routed.around

    def sources(self) -> dict[str, nn.Module]:
        """See `RoutedTokens.sources`."""
        return self._routed.sources()

    def learn(self, findings: Findings) -> None:
        """Takes over what was observed; to be called before the batches run, and before `watching`."""
        self.findings = findings
        self._kept.clear()
        self._rules.clear()
        self._calls.clear()
        self._hiding.clear()

    def join(self, batches: Sequence[Batch]) -> None:
        """Told that the same samples run in other batches from here on, before what is to be learned of them."""
        self._batches = batches
        self._kept.clear()
        self._counts.clear()
        self._without.clear()

    @contextlib.contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Marks batch `number` as running on this thread inside the block, which surrounds its forward."""
        for called in [called for called in self._calls if called[0] == number]:
            del self._calls[called]
        before = _running.set(number)
        try:
            yield
        finally:
            _running.reset(before)

    def rows(self, number: int, layer: str, x: Tensor, *, by_expert: bool = False) -> Rows:
        """The rows of a layer's input that count; an expert's, by the tokens routed to it.

        Args:
            number: The batch's.
            layer: Its name.
            x: The input, [..., in].
            by_expert: The rows are those of all experts, one after the other.

        Raises:
            CalibrationError: token_weighting is "labels", and the batch has none.
        """
        rows = x.reshape(-1, x.shape[-1])
        if self._routed.is_expert(layer):
            return self._experts_rows(number, layer, rows, by_expert)
        mask = self._mask_of(number, layer, x)
        if isinstance(mask, Tensor):
            return Rows(rows[mask], None, mask=mask)
        if mask is EVERY_ROW:
            return Rows(rows, None)
        one_each = rows.shape[0] == self._batches[number].samples
        return Rows(rows, _UNMATCHED if x.dim() == 2 and not one_each else _UNDESCRIBED)

    def share_input(self, layers: Sequence[str]) -> None:
        """Told of layers that read the same input, of which the first was asked about with `rows`."""
        self._routed.share_input(layers)

    def check(self) -> None:
        """Refuses batches without labels if labels are read from batches.

        Raises:
            CalibrationError: A batch has no labels.
        """
        for number, batch in enumerate(self._batches):
            if self._reads_batches and labels_of(batch.data) is None:
                raise CalibrationError(_no_labels(number))

    def notes(self) -> dict[str, int]:
        """Number of batches for each remark."""
        return {
            "hold no label that counts (all are -100): none of their positions enters a Hessian": len(self._without)
        }

    def over_ranks(self) -> dict[str, str]:
        """How each mask that hid something on any rank is read, by its name. All ranks call it."""
        of_all = distributed.gather_objects(sorted(self._hiding))
        hiding = sorted({key for of_rank in of_all for key in of_rank})
        masks = self.findings.masks or dict.fromkeys(hiding, UNSEEN)
        return {_name(key): masks[key] for key in hiding if key in masks}

    def _experts_rows(self, number: int, layer: str, rows: Tensor, by_expert: bool) -> Rows:
        kept, are_tokens = self._routed.counted(number, layer, rows)
        if kept is None:
            kept = self._mask_of(number, "", rows)  # every token, with a weight that may be 0
            if by_expert and kept is not EVERY_ROW:
                kept = None  # as many as there are tokens, perhaps, but in another order
        if isinstance(kept, Tensor):
            return Rows(rows[kept], None, are_tokens, kept)
        return Rows(rows, _UNKNOWN_TOKENS if kept is None else None, are_tokens)

    def _mask_of(self, number: int, name: str, x: Tensor) -> Mask:
        """The rows of a module's input that count: bool [rows], EVERY_ROW, or None if that is unknown."""
        if number not in self._kept:  # no model has been called yet
            self._read_batch(number)
        kept = self._kept[number]
        call, self._calls[number, name] = self._calls[number, name], self._calls[number, name] + 1
        rule = self._rule(name, call)
        if rule is None:
            if all(one.is_whole for one in kept.values()):
                return EVERY_ROW
            fits = (rows for one in kept.values() for _, rows in fitting(one.mask, x.shape))
            rows = next(fits, None)
            return None if rows is None else rows.to(x.device)
        if rule.key is None or rule.key not in kept or kept[rule.key].is_whole:
            return EVERY_ROW
        rows = rows_in(rule.layout, kept[rule.key].mask, x.shape)
        return None if rows is None else rows.to(x.device)

    def _rule(self, layer: str, call: int) -> Rule | None:
        if layer not in self._rules:
            self._rules[layer] = self.findings.of_layer(layer)
        rules = self._rules[layer]
        if len(set(rules)) == 1:
            return rules[0]
        return rules[call] if call < len(rules) else None

    def _read_batch(self, number: int) -> None:
        models = [(name, model) for name, model in transformers_models(self._root)]
        name, model = models[0] if len(models) == 1 else ("", self._root)
        self._read(number, name, model, arguments_of(fields_of(self._batches[number].data) or {}))

    def _read(self, number: int, name: str, module: nn.Module, arguments: dict[str, Tensor]) -> None:
        """Takes in a call's masks and, if positions are chosen by them, labels."""
        counts = self._in_the_loss(number, module, arguments) if self._by_labels else None
        of_batch = masks_among(arguments_of(fields_of(self._batches[number].data) or {}))
        inverted = {mask for of_module, mask in self.findings.inverted if of_module == name}
        kept = self._kept.setdefault(number, {})
        used = False
        for mask, sequence in sequences_in(module, with_masks(arguments, of_batch), inverted).items():
            key, counted = (name, mask), sequence.kept
            if self.findings.ignores(key):
                counted = torch.ones_like(counted)
            if not bool(sequence.kept.all()):
                self._hiding.add(key)
            is_labelled = mask == TARGETS or not self._has_targets
            if counts is not None and is_labelled and counts.shape == counted.shape:
                counted, used = counted & counts.to(counted.device), True
                self._count_without(number, counted)
            if key in self.findings.masks or not self.findings.masks:
                kept[key] = _Kept.of(counted)
        if not used and counts is not None:
            kept[name, "labels"] = _Kept.of(counts)
            self._count_without(number, counts)

    def _count_without(self, number: int, counted: Tensor) -> None:
        if not bool(counted.any()):
            self._without.add(number)

    def _in_the_loss(self, number: int, module: nn.Module, arguments: Mapping[str, Tensor]) -> Tensor:
        """The positions that the loss looks at, by the labels of a model's call or else of the batch."""
        is_model = any(module is model for _, model in transformers_models(self._root))
        if not is_model and number in self._counts:
            return self._counts[number]  # a module inside
        labels = arguments.get("labels")
        if not is_token_labels(labels):
            labels = labels_of(self._batches[number].data)
            self._reads_batches = True
        if labels is None:
            raise CalibrationError(_no_labels(number))
        counts = in_the_loss(labels)
        self._counts[number] = pad(counts[:, 1:], (0, 1)) if predicts_next(module) else counts
        return self._counts[number]


def _name(key: Key) -> str:
    module, mask = key
    mask = "padding behind a decoder's labels or in its mask" if mask == TARGETS else f"`{mask}`"
    return f"{mask} of {module}" if module else mask


def _no_labels(number: int) -> str:
    return (
        f"token_weighting='labels' counts the positions whose label is not {IGNORED_LABEL}, and calibration batch "
        f"{number} has no labels [samples, positions]: give batches with a field `labels`, or a calibration_step "
        "that passes labels=... to the transformers model, or leave token_weighting at 'all'"
    )
