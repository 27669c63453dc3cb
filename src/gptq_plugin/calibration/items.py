"""What an item of calibration data is: the tokens of a sample, a row of numbers, or a batch; and samples stacked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeGuard

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from gptq_plugin.calibration.batches import fields_of
from gptq_plugin.calibration.given import refuse_item, tensor_of
from gptq_plugin.calibration.takes import Takes
from gptq_plugin.calibration.text_rows import encoded
from gptq_plugin.errors import CalibrationError, brief

# Fields that are part of a token sample whatever the model takes: calibration itself reads them.
_TOKEN_KEYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "labels"})
_RAGGED = (
    "a calibration batch holds token lists of different lengths: give each list as a sample of its own, or pad them: "
    "tokenizer(texts, padding=True, return_tensors='pt')"
)


class Items:
    """Reads items one by one, and counts what was left out of them.

    Args:
        tokenizer: For texts; None without one.
        seq_len: Longest token sample; longer ones are cut.
        takes: What the model takes.

    Attributes:
        notes: Number of samples by what was done to them, to follow "12 calibration samples".
    """

    def __init__(self, tokenizer: Callable[..., Any] | None, seq_len: int, takes: Takes) -> None:
        self.notes: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._takes = takes

    def read(self, item: Any, *, is_batch: bool = False, rows: bool = True) -> tuple[Any, Any]:
        """Reads an item: (sample, None), or (None, batch).

        A sample is to be stacked with others: tokens, [1, positions] for each field, or a row of numbers with whatever
        belongs to it.

        Args:
            item: Of the data.
            is_batch: It is known to be one.
            rows: An item whose first tensor has one dimension is a row of numbers.

        Raises:
            CalibrationError: It is neither, or tokens are no whole numbers, or negative, or of different lengths.
        """
        refuse_item(item)
        item = self._encoded(item)
        sample = None
        if not is_batch:
            sample = self._tokens(item) if _has_tokens(item) else item if rows and _is_row(item) else None
        return (None, _batch(item)) if sample is None else (sample, None)

    def _encoded(self, item: Any) -> Any:
        """The item with its texts tokenized, and tensors in place of arrays and plain numbers."""
        given, item = item, _tensors_for_arrays(encoded(item, self._tokenizer))
        if _has_tokens(given) and _has_tokens(item):
            self._note_left_out([key for key in given if key not in item])
        if isinstance(item, (list, tuple)) and _are_numbers(item):
            numbers = _tensor(item)
            if numbers is None:
                raise CalibrationError(_RAGGED)
            item = numbers if numbers.numel() else {"input_ids": numbers}
        if isinstance(item, Tensor) and item.dim() == 1 and not item.is_floating_point() and item.dtype != torch.bool:
            item = {"input_ids": item}
        return item

    def _note_left_out(self, fields: Sequence[str]) -> None:
        if fields:
            self.notes[f"had fields that {self._takes.name} does not take, left out: {', '.join(fields)}"] += 1

    def _tokens(self, item: Mapping[str, Any]) -> dict[str, Tensor] | None:
        rows = {key: _as_row(value) for key, value in item.items()}
        ids = rows["input_ids"]
        if ids is None:
            return None
        _refuse_ids(ids)
        of_all = [key for key in rows if self._is_of_all(key, item)]
        strange = [key for key, row in rows.items() if row is None or key in of_all or not self._is_taken(key)]
        if any(self._is_needed(key, item[key]) for key in strange) or (of_all and _has_samples(item["input_ids"])):
            return None  # a batch of one sample: an image beside its text, say, or where the sequences in it begin
        self._note_left_out(strange)
        longest = self._seq_len if self._takes.longest is None else min(self._seq_len, self._takes.longest)
        if longest < min(self._seq_len, ids.shape[1]):
            self.notes[f"were cut to the {longest} positions that the model has"] += 1
        return {key: row[:, :longest] for key, row in rows.items() if row is not None and key not in strange}

    def _is_taken(self, key: str) -> bool:
        return key in _TOKEN_KEYS or self._takes.fields is None or key in self._takes.fields

    def _is_of_all(self, key: str, item: Mapping[str, Any]) -> bool:
        """True for what a forward takes by an option and that is nothing of each token's."""
        if key not in self._takes.options:
            return False
        value, ids = _tensor(item[key]), _tensor(item["input_ids"])
        return value is None or ids is None or value.shape != ids.shape

    def _is_needed(self, key: str, value: Any) -> bool:
        """True for a field that the model takes, or may take, and that is no row of numbers."""
        if self._takes.fields is None and not isinstance(value, Tensor):
            return False
        tensor = _tensor(value)
        return self._is_taken(key) and tensor is not None and tensor.dim() > 0 and _as_row(tensor) is None


def stacked(samples: Sequence[Any], batch_size: int) -> Iterator[Any]:
    """Yields the data of batches of samples of equal fields and shapes, so that none needs padding."""
    alike: dict[tuple[Any, ...], list[Any]] = {}
    for sample in samples:
        alike.setdefault(_kind(sample), []).append(sample)
    for same in alike.values():
        rest = iter(same)
        while chunk := list(islice(rest, batch_size)):
            yield _stack(chunk)


def _kind(sample: Any) -> tuple[Any, ...]:
    if _has_tokens(sample):
        return tuple((key, sample[key].shape[1]) for key in sorted(sample))
    return tuple(leaf.shape for leaf in tree_leaves(sample) if isinstance(leaf, Tensor))


def _stack(chunk: list[Any]) -> Any:
    if _has_tokens(chunk[0]):
        return {key: torch.cat([sample[key] for sample in chunk]) for key in chunk[0]}
    try:
        return default_collate(chunk)
    except (TypeError, RuntimeError) as error:
        raise CalibrationError(
            f"samples of the calibration data cannot be put into a batch ({brief(error)}): give a DataLoader with a "
            "collate_fn"
        ) from error


def is_empty(sample: Any) -> bool:
    """True for a token sample without tokens."""
    return _has_tokens(sample) and sample["input_ids"].numel() == 0


def _is_row(item: Any) -> bool:
    """True for one row of numbers, with others or with a target beside it: its first tensor has one dimension."""
    parts = fields_of(item)
    leaves = tree_leaves(list(parts.values()) if parts is not None else item)
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    return first is not None and first.dim() == 1 and first.is_floating_point()


def _refuse_ids(ids: Tensor) -> None:
    if not ids.numel():
        return
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise CalibrationError(
            f"input_ids of the calibration data are {str(ids.dtype).removeprefix('torch.')}: give whole numbers, as a "
            "tokenizer does"
        )
    if int(ids.min()) < 0:
        raise CalibrationError(
            f"a token id of the calibration data is {int(ids.min())}: ids begin at 0. Labels have -100 for what does "
            "not count; give the tokens themselves, and padding an attention_mask"
        )


def _as_row(value: Any) -> Tensor | None:
    tensor = _tensor(value)
    if tensor is None:
        return None
    if tensor.numel() == 0:
        return tensor.reshape(1, 0).long()
    if tensor.dim() == 1:
        return tensor[None]
    return tensor if tensor.dim() == 2 and tensor.shape[0] == 1 else None


def _has_samples(ids: Any) -> bool:
    return isinstance(ids, Tensor) and ids.dim() == 2


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None


def _are_numbers(item: Any) -> bool:
    """True for nested lists of numbers, empty ones too."""
    if isinstance(item, (list, tuple)):
        return all(map(_are_numbers, item))
    return isinstance(item, (int, float))


def _has_tokens(item: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(item, Mapping) and "input_ids" in item


def _batch(item: Any) -> Any:
    """The batch with tensors in place of nested lists of numbers."""
    if not _has_tokens(item) or isinstance(item["input_ids"], Tensor):
        return item
    if _are_numbers(item["input_ids"]) and _tensor(item["input_ids"]) is None:
        raise CalibrationError(_RAGGED)
    return {key: _tensor(value) if _are_numbers(value) else value for key, value in item.items()}


def _tensors_for_arrays(item: Any) -> Any:
    if isinstance(item, Mapping):
        arrays = [key for key, value in item.items() if isinstance(value, numpy.ndarray)]
        return {**item, **{key: tensor_of(item[key]) for key in arrays}} if arrays else item
    if not any(isinstance(leaf, numpy.ndarray) for leaf in tree_leaves(item)):
        return item
    return tree_map(lambda leaf: tensor_of(leaf) if isinstance(leaf, numpy.ndarray) else leaf, item)
