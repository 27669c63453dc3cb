"""Unpicklers that run nothing of what a file names: `InertUnpickler`, and `BoundedUnpickler` for others.

A pickle is a program, and what it builds can be far larger than itself: a tuple that holds a tuple twice, forty times
over, has 2^40 parts for whoever hashes it. What is built here takes time and memory in proportion to the file.

Tested by tests/lightning/test_checkpoint_file.py: by files of every kind.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import torch

_PARTS = 10**6  # of a tuple, each counted as often as it occurs
_CLASSES = 1000  # that a file names

_Step = Callable[[Any], None]


def _measuring(step: _Step) -> _Step:
    def load_and_measure(self: BoundedUnpickler) -> None:
        step(self)
        self.measure(self.stack[-1])  # type: ignore[attr-defined]

    return load_and_measure


_STEPS: dict[int, _Step] = pickle._Unpickler.dispatch
_TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)


class BoundedUnpickler(pickle._Unpickler):
    """The unpickler in Python, whose steps can be replaced, without tuples that take for ever to hash.

    Raises:
        pickle.UnpicklingError: A tuple has too many parts.
    """

    dispatch: ClassVar[dict[int, _Step]] = {**_STEPS, **{op[0]: _measuring(_STEPS[op[0]]) for op in _TUPLES}}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts: dict[int, int] = {}  # of tuples, by `id`, which a later one may have again

    def measure(self, made: tuple[Any, ...]) -> None:
        """Counts a new tuple's parts."""
        parts = 1 + sum(self._parts.get(id(part), 1) if type(part) is tuple else 1 for part in made)
        if parts > _PARTS:
            raise pickle.UnpicklingError(f"it holds a tuple of more than {_PARTS:,} parts")
        self._parts[id(made)] = parts


class StandIn:
    """Takes the place of anything in a file that is neither a tensor nor a plain value. It accepts every step of
    unpickling, and keeps nothing.

    Attributes:
        stands_for: Full name of what the file has there.
    """

    stands_for = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return StandIn()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Drops an item of a list."""

    def extend(self, items: Any) -> None:
        """Drops items of a list."""

    def add(self, item: Any) -> None:
        """Drops an item of a set."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{self.stands_for or 'an object'} of the checkpoint was not built, so it has no {name!r}: only tensors "
            "and plain values are read"
        )


class InertUnpickler(BoundedUnpickler):
    """Builds tensors and plain values, and a `StandIn` for everything else.

    Attributes:
        file_bytes: Size of the file: no tensor's storage is larger.
        records: Bytes of each storage in the file, by its key, as far as they are known.
    """

    file_bytes: int = 0
    records: Mapping[str, int] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stand_ins: dict[tuple[str, str], type[StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MADE_HERE:
            return _MADE_HERE[module, name]
        kind = getattr(torch, name, None) if module == "torch" else None
        if isinstance(kind, torch.dtype) or name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        if (module, name) not in self._stand_ins:
            if len(self._stand_ins) == _CLASSES:
                raise pickle.UnpicklingError(f"it names more than {_CLASSES:,} classes")
            made = type(name.rpartition(".")[2], (StandIn,), {"stands_for": f"{module}.{name}"})
            self._stand_ins[module, name] = made
        return self._stand_ins[module, name]

    def load_build(self) -> None:
        """Gives an object its state: only the metadata of a state_dict is kept."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state, built = stack.pop(), stack[-1]
        if type(built) is OrderedDict and isinstance(state, dict):
            built.__dict__.update(state)

    def load_binpersid(self) -> None:
        """Reads a storage of the size that the file has for it."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        _, kind, key, _, numbers, *_ = identifier = stack.pop()
        if identifier[0] != "storage":
            raise pickle.UnpicklingError(f"it refers to a {identifier[0]!r}, not to a storage")
        kind, itemsize = (torch.UntypedStorage, 1) if kind is _Untyped else (kind, kind.dtype.itemsize)
        size = numbers * itemsize
        if not 0 <= size <= self.file_bytes or self.records.get(key, size) != size:
            raise pickle.UnpicklingError(f"it has {numbers:,} numbers in storage {key}, whose size is another")
        stack.append(self.persistent_load(("storage", kind, *identifier[2:])))  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, _Step]] = {
        **BoundedUnpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BINPERSID[0]: load_binpersid,
    }


class _Untyped:
    """torch.UntypedStorage as the kind of a storage; the class itself would allocate what it is called with."""


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Bytes, as pickles before protocol 3 write them."""
    return text.encode("latin1")


def _bytearray(content: bytes | str = b"", encoding: str = "latin1") -> bytearray:
    if not isinstance(content, (bytes, str)):
        raise pickle.UnpicklingError(f"it makes bytes of a {type(content).__name__}")
    return bytearray(content if isinstance(content, bytes) else _bytes(content))


def _listed(items: Any) -> Any:
    """Items that lie in the file one by one: a tensor's may be more than fit anywhere."""
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError(f"it makes a container of a {type(items).__name__}")
    return items


def _set(items: Any = ()) -> set[Any]:
    return set(_listed(items))


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_listed(items))


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(_listed(items))


def _size(items: Any = ()) -> torch.Size:
    return torch.Size(_listed(items))


_MADE_HERE: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes,
    ("collections", "OrderedDict"): _ordered,
    ("torch", "Size"): _size,
    ("torch.storage", "UntypedStorage"): _Untyped,
    **{
        (builtins, made.__name__[1:]): made
        for builtins in ("builtins", "__builtin__")  # the latter in pickles before protocol 3
        for made in (_bytearray, _set, _frozenset)
    },
}
# None of these runs anything, or takes more than it is given, whatever its arguments are.
_PLAIN: dict[str, set[str]] = {
    "builtins": {"complex"},
    "__builtin__": {"complex"},
    "torch": {"device"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_parameter",
        "_rebuild_sparse_tensor",
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
    },
}
