"""What users give as calibration data: refused where it is none, and made something to go through more than once."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gptq_plugin.calibration.batches import leaves, with_own_tensors
from gptq_plugin.device.finite import has_values
from gptq_plugin.errors import CalibrationError, some
from gptq_plugin.options import fields

_MOST_VALUES, _DEEPEST = 2**22, 64  # of an item; one that holds no tensors takes seconds to read then


def items_of(data: Any, batch_size: int) -> Iterable[Any]:
    """The items of the data; those of one tensor or array are its rows, or batches if it has more than two dimensions.

    Raises:
        CalibrationError: It is no calibration data: see `refuse_single`.
    """
    refuse_single(data)
    if isinstance(data, numpy.ndarray):
        data = tensor_of(data) if _holds_numbers(data) else data.tolist()
    if isinstance(data, Tensor) and data.dim() > 2:
        return data.split(batch_size)
    items: Iterable[Any] = data
    return items


def rereadable(data: Any, nsamples: int, batch_size: int = 1) -> Iterable[Any]:
    """Data that can be read twice: an iterator is replaced by a list of the items that `nsamples` may need.

    Args:
        data: As users give it.
        nsamples: Number of samples.
        batch_size: As for `items_of`.

    Raises:
        CalibrationError: As `refuse_single`.
    """
    items = items_of(data, batch_size)
    if isinstance(data, Tensor):
        return data
    if isinstance(items, DataLoader) or not _is_iterator(items):
        return items
    return list(map(_own, islice(items, nsamples + 1)))


def _own(item: Any) -> Any:
    refuse_item(item)
    return with_own_tensors(item)


def tensor_of(array: numpy.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor; NumPy's default dtype, float64, becomes PyTorch's, in which models are.

    Raises:
        CalibrationError: It does not hold numbers.
    """
    try:
        tensor = torch.as_tensor(array, device="cpu")
    except TypeError as error:
        raise CalibrationError(
            f"the calibration data holds an array {array.shape} of {array.dtype}, which are no numbers: give lists of "
            "numbers of one length, or texts"
        ) from error
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def refuse_single(data: Any) -> None:
    """Refuses what is no calibration data: a single text, sample or batch, which would be taken apart, or no data.

    Raises:
        CalibrationError: With what to give instead.
    """
    if data is None:
        raise CalibrationError("there is no calibration data (None): give texts, token lists or batches")
    if isinstance(data, (str, bytes)):
        raise CalibrationError("calibration data is one text: give a list of texts, [text]")
    if isinstance(data, Mapping):
        _refuse_mapping(data)
    if hasattr(data, "columns") and hasattr(data, "shape"):
        raise CalibrationError(
            f"calibration data is a table ({type(data).__name__}), of which only the names of its columns would be "
            "read: give one column of texts, table['text'].to_list(), or the rows of numbers, table.to_numpy()"
        )
    if isinstance(data, Tensor) or (isinstance(data, numpy.ndarray) and _holds_numbers(data)):
        _refuse_tensor(data if isinstance(data, Tensor) else tensor_of(data))
        return
    if isinstance(data, numpy.ndarray) and data.ndim != 1:
        raise CalibrationError(f"calibration data is an array {data.shape} of {data.dtype}: give a list of samples")
    loader = next((name for name in ("train_dataloader", "get_train_dataloader") if hasattr(data, name)), None)
    if loader is not None:
        raise CalibrationError(f"calibration data is a {type(data).__name__}: give one of its dataloaders, .{loader}()")
    if isinstance(data, (list, tuple)) and data:
        refuse_item(data[0])
    if isinstance(data, (set, frozenset)):
        raise CalibrationError("calibration data is a set, whose order is another in every run: give a list")
    if isinstance(data, (type, nn.Module, numpy.generic)) or not _is_iterable(data):
        raise CalibrationError(
            f"calibration data is {_shown(data)}, which holds no samples: give texts, token lists, batches or a "
            "DataLoader"
        )


def refuse_item(item: Any) -> None:
    """Refuses an item that is no sample and no batch: a number, or None; and tensors without values or of no one shape.

    Raises:
        CalibrationError: With what to give instead.
    """
    if item is None:
        raise CalibrationError("an item of the calibration data is None: leave it out, or give the texts themselves")
    if isinstance(item, (bool, int, float, numpy.number)) or (isinstance(item, Tensor) and item.dim() == 0):
        raise CalibrationError(
            f"the calibration data holds numbers ({_shown(item)}, ...), and one sample is a list of them: give a list "
            "of samples, [[1, 2, 3]]"
        )
    if not _is_walkable(item):
        raise CalibrationError(
            f"an item of the calibration data, a {type(item).__name__}, holds more than {_MOST_VALUES:,} values, lists "
            f"in more than {_DEEPEST} others, or itself: give numbers as tensors or arrays"
        )
    for _, value in leaves(item):
        if isinstance(value, Tensor) and value.is_nested:
            raise CalibrationError(
                "the calibration data holds a nested tensor, whose rows differ in length: give each row as a sample "
                "of its own, or pad them and give an attention_mask (torch.nested.to_padded_tensor)"
            )
        if isinstance(value, Tensor) and not has_values(value):
            raise CalibrationError(
                "the calibration data holds a tensor on the meta device, or of FakeTensorMode, which has no values: "
                "give real data"
            )


def _is_walkable(item: Any) -> bool:
    """True for an item whose lists and mappings may be walked: each time one occurs in them it is walked again."""
    sizes: dict[int, int] = {}  # numbers of values by the container's id

    def count(value: Any, depth: int) -> int:
        if not isinstance(value, (list, tuple, dict, UserDict)):
            return 1
        if depth > _DEEPEST:
            return _MOST_VALUES + 1
        if id(value) not in sizes:
            sizes[id(value)] = _MOST_VALUES + 1  # one that it is in itself
            inner = list(value.values() if isinstance(value, (dict, UserDict)) else value)
            nested = [one for one in inner if isinstance(one, (list, tuple, dict, UserDict))]
            sizes[id(value)] = len(inner) - len(nested) + 1 + sum(count(one, depth + 1) for one in nested)
        return sizes[id(value)]

    return count(item, 0) <= _MOST_VALUES


def _refuse_mapping(data: Mapping[Any, Any]) -> None:
    splits = [name for name, part in data.items() if hasattr(part, "column_names")]
    if splits:
        raise CalibrationError(f"calibration data has the splits {some(map(str, splits))}: give one, [{splits[0]!r}]")
    raise CalibrationError("calibration data is one mapping: give a list of batches, [batch]")


def _refuse_tensor(data: Tensor) -> None:
    if data.dim() >= 2:
        return
    kind = f"{str(data.dtype).removeprefix('torch.')} {tuple(data.shape)}"
    if data.is_floating_point():
        raise CalibrationError(f"calibration data is one row of numbers ({kind}): give a tensor [rows, features]")
    raise CalibrationError(f"calibration data is one list of token ids ({kind}): give a list of samples, [ids]")


def _is_iterable(data: Any) -> bool:
    return _is_iterator(data) or hasattr(data, "__iter__") or hasattr(data, "__getitem__")


def _is_iterator(data: Any) -> bool:
    return hasattr(data, "__next__")


def _holds_numbers(array: numpy.ndarray[Any, Any]) -> bool:
    return array.dtype.kind in "biuf"


def _shown(value: Any) -> str:
    shown = fields.shown(value)
    return shown if len(shown) <= 60 else f"a {type(value).__name__}"
