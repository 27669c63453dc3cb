"""Reads user-defined batches: fields by name, labels, number of samples, digest; and moves them to a device."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gptq_plugin.calibration.mask_values import kept_positions
from gptq_plugin.device.raw_bytes import raw_bytes

_ALL = 2**256  # SHA-256 digests are numbers below it


def fields_of(data: Any) -> Mapping[str, Any] | None:
    """Fields of a mapping, dataclass or named tuple by name; None if data has no named fields."""
    if isinstance(data, Mapping):
        return data
    if _is_dataclass(data):
        return {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return data._asdict() if isinstance(data, tuple) and hasattr(data, "_asdict") else None


def labels_of(data: Any) -> Tensor | None:
    """The labels of a batch's positions, int [samples, positions], at any depth; None if there are none, or several,
    which cannot be matched to calls."""
    found = [value for name, value in leaves(data) if name == "labels" and is_token_labels(value)]
    return found[0] if len(found) == 1 else None


def is_token_labels(value: Any) -> bool:
    """True for per-position class labels; False for per-sample labels and regression targets."""
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def sample_count(data: Any) -> int:
    """The first dimension of the first tensor; 1 without one."""
    if isinstance(data, Tensor):
        return data.shape[0] if data.dim() else 1
    return next((v.shape[0] for _, v in leaves(data) if isinstance(v, Tensor) and v.dim()), 1)


def digest(data: Any) -> int:
    """Sum of its samples' SHA-256 modulo 2^256, so that the total does not depend on order or division into batches.

    A sample is its part of every tensor of the batch: name, dtype, shape and bytes. Positions hidden by an
    ``attention_mask`` are left out, so that padding does not matter. A list of texts or numbers with as many items as
    samples is divided among them; other texts and numbers belong to every sample. A batch without tensors, or with one
    that is not divided into samples (another first dimension, or none), is one sample.
    """
    named = sorted(leaves(data), key=lambda leaf: leaf[0])
    tensors = [(name, _on_cpu(value)) for name, value in named if isinstance(value, Tensor)]
    plain = [(name, value) for name, value in named if _is_plain(value)]
    samples = sample_count(data)
    if not tensors or any(value.dim() == 0 or value.shape[0] != samples for _, value in tensors):
        return _sha256([*_encode_tensors(tensors), *_encode_plain(plain)])
    mask = (fields_of(data) or {}).get("attention_mask")
    kept = kept_positions(_on_cpu(mask), False) if isinstance(mask, Tensor) and mask.dim() == 2 else None
    total = 0
    for row in range(samples):
        parts = [(name, value[row]) for name, value in tensors]
        if kept is not None:
            own = kept[row]
            parts = [(name, part[own] if part.shape[:1] == own.shape else part) for name, part in parts]
        of_all = [(name, value[row] if _has_length(value, samples) else value) for name, value in plain]
        total += _sha256([*_encode_tensors(parts), *_encode_plain(of_all)])
    return total % _ALL


def to_device(data: Any, device: torch.device | None) -> Any:
    """A copy of the batch with tensors of its own on the device; None leaves them where they are.

    A forward may write to what it gets, and the next run of the batch begins as the first did. A mapping of a class of
    its own moves itself, and may share tensors with its copy.
    """
    if isinstance(data, Mapping) and not isinstance(data, (dict, UserDict)) and hasattr(data, "to"):
        copied = copy.copy(data)
        return copied if device is None else copied.to(device)
    return map_tensors(data, lambda tensor: tensor.to(tensor.device if device is None else device, copy=True))


def map_tensors(data: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the batch with every tensor changed."""
    return _map(data, lambda value: change(value) if isinstance(value, Tensor) else value)


def with_own_tensors(data: Any) -> Any:
    """A copy of a sample or batch that shares no tensor, array or list with it; mappings of a class of their own do.

    Of what an iterator gives: it may give the same tensor again, with other values.
    """
    if isinstance(data, Mapping) and not isinstance(data, (dict, UserDict)):
        return copy.copy(data)
    return _map(data, lambda value: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value))


def row_of(data: Any, row: int) -> Any:
    """The batch cut to one sample, [1, ...]; see `rows_of`."""
    return rows_of(data, slice(row, row + 1))


def rows_of(data: Any, rows: slice) -> Any:
    """The batch cut to some samples: of every tensor whose first dimension is the number of samples, those rows.

    A list of texts or numbers with as many items as samples is cut too.
    """
    return _each_divided(data, lambda value: value[rows])


def copies_of(data: Any, row: int, count: int) -> Any:
    """The batch with so many copies of one sample in place of its samples; see `rows_of`."""

    def copies(value: Any) -> Any:
        one = value[row : row + 1]
        return torch.cat([one] * count) if isinstance(one, Tensor) else one * count

    return _each_divided(data, copies)


def _each_divided(data: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of the batch with everything changed that is divided into samples."""
    samples = sample_count(data)

    def change_one(value: Any) -> Any:
        divided = value.shape[:1] == (samples,) if isinstance(value, Tensor) else _has_length(value, samples)
        return change(value) if divided else value

    return _map(data, change_one)


def _map(data: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of the batch with every tensor, array, text, number, and list of texts or numbers changed."""
    if isinstance(data, UserDict):  # a BatchEncoding
        changed = copy.copy(data)
        changed.data = _map(data.data, change)
        return changed
    if isinstance(data, Mapping):
        return {key: _map(value, change) for key, value in data.items()}
    if _is_dataclass(data):
        changed = copy.copy(data)
        for field in dataclasses.fields(data):
            object.__setattr__(changed, field.name, _map(getattr(data, field.name), change))  # may be frozen
        return changed

    def map_one(value: Any) -> Any:
        if _is_inner(value):
            return _map(value, change)
        return change(value) if isinstance(value, (Tensor, numpy.ndarray)) or _is_plain(value) else value

    def is_one(value: Any) -> bool:
        return _is_inner(value) or _is_plain(value)

    return tree_map(map_one, data, is_leaf=is_one)  # BatchEncoding and dataclasses are not pytrees


def _on_cpu(value: Tensor) -> Tensor:
    value = value.detach()
    return (value if value.layout is torch.strided else value.to_dense()).cpu()


def _encode_tensors(tensors: list[tuple[str, Tensor]]) -> Iterator[bytes]:
    for name, value in tensors:
        yield f"{name} {value.dtype} {list(value.shape)} ".encode()
        yield raw_bytes(value).numpy().tobytes()


def _encode_plain(plain: list[tuple[str, Any]]) -> Iterator[bytes]:
    if plain:
        yield repr(plain).encode()


def _is_plain(value: Any) -> bool:
    """True for a text or a number, or a list of these."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, bytes, int, float))


def _has_length(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _sha256(parts: Iterable[bytes]) -> int:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return int.from_bytes(hashed.digest(), "big")


def _is_inner(value: Any) -> bool:
    return isinstance(value, Mapping) or _is_dataclass(value)


def _is_dataclass(data: Any) -> bool:
    return dataclasses.is_dataclass(data) and not isinstance(data, type)


def leaves(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of everything in nested mappings, dataclasses, tuples and objects."""
    parts = fields_of(data)
    if parts is not None:
        for key, value in parts.items():
            yield from leaves(value, str(key))
    elif isinstance(data, (list, tuple)) and not _is_plain(data):
        for value in data:
            yield from leaves(value)
    elif not name and not isinstance(data, Tensor) and hasattr(data, "__dict__"):
        for key, value in vars(data).items():  # a user-defined object
            yield from leaves(value, key)
    else:
        yield name, data
