"""A digest of any value, of modules and functions too, by what they compute with: `Fingerprint`."""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import threading
import types
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptq_plugin.cache.digests import tensor_digest
from gptq_plugin.cache.reached import Reached, bytecode
from gptq_plugin.cache.versions import TRAINERS, is_versioned, package_of, version_of

_MOST = 10**6  # values; what holds more is no part of a model
_THREADS = 8  # that read tensors, at most about as fast as memory
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_SILENT = (logging.Logger, type(threading.Lock()), type(threading.RLock()), weakref.ref, logging.LoggerAdapter)
_NAMES_OF_MODELS = ("_name_or_path", "name_or_path", "_commit_hash", "_original_object_hash")
# Of a model's configuration: written when the model is saved. Its code and its weights count themselves.
_WRITTEN_BY_SAVING = ("architectures", "dtype", "torch_dtype", "transformers_version")
_APART = ("_parameters", "_buffers", "_modules")
_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_IGNORED = (  # of a module: it computes the same without
    *_NAMES_OF_MODELS,
    *_FORWARD_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
)


class NotKnown(Exception):
    """The value of an object cannot be told; the message names it."""


class Fingerprint:
    """Takes in values, in an order that counts. Equal fingerprints are of equal values, as far as they compute.

    Objects are what pickle would keep of them. Code of packages with a version counts by that, other code by its
    bytecode, with all functions, variables and methods that it reaches by name (`Reached`). A function may have an
    attribute ``depends_on``, a tuple of values that stands for what its closure holds.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no `id` is used twice
        self._reached = Reached(self._value)
        self._packages: set[str] = set()
        self._read: dict[int, str] = {}  # digests of tensors, by `id`

    def read_ahead(self, tensors: Iterable[Tensor]) -> None:
        """Reads tensors on the CPU on several threads, that `add` would read one after the other."""
        own = [one for one in tensors if one.device.type == "cpu" and one.layout is torch.strided and not one.is_nested]
        self._alive += own
        with ThreadPoolExecutor(_THREADS) as pool:
            self._read.update(zip(map(id, own), pool.map(tensor_digest, own), strict=True))

    def add(self, name: str, value: Any) -> None:
        """Takes in a value.

        Raises:
            NotKnown: Something in it cannot be told.
        """
        self._token("name", name)
        try:
            self._value(value)
            self._reached.follow()
        except NotKnown as unknown:
            raise NotKnown(f"{name}: {unknown}") from None
        except RecursionError:
            raise NotKnown(f"{name}: holds too many values in each other") from None

    def hexdigest(self) -> str:
        """The digest of all that was taken in, and of the versions of the packages it uses."""
        whole = self._hash.copy()
        for package in sorted(self._packages):
            whole.update(f"{package} {version_of(package)} ".encode())
        return whole.hexdigest()

    def _token(self, kind: str, text: Any = "") -> None:
        encoded = str(text).encode(errors="surrogatepass")
        self._hash.update(f"{kind}:{len(encoded)}:".encode() + encoded)

    def _value(self, value: Any) -> None:
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            self._token(type(value).__name__, repr(value))
            return
        self._alive.append(value)
        if len(self._alive) > _MOST:
            raise NotKnown(f"holds more than {_MOST} values")
        if not isinstance(value, (tuple, Tensor, np.ndarray)):  # equal ones may be one or two objects
            if id(value) in self._seen:
                self._token("again", self._seen[id(value)])
                return
            self._seen[id(value)] = len(self._seen)
        self._new(value)

    def _new(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._token("array", f"{value.dtype} {value.shape}")
            self._hash.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, enum.Enum):
            self._token("enum", f"{type(value).__qualname__} {value.name}")
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self._package(value.__name__)
        elif not self._callable(value) and not self._collection(value):
            self._object(value)

    def _tensor(self, value: Tensor) -> None:
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout is not torch.strided:
            raise NotKnown(f"a tensor of type {type(value).__name__} and layout {value.layout}")
        if value.is_nested or value.is_quantized or value.is_meta:
            raise NotKnown("a nested, quantized or meta tensor")
        digest = self._read.get(id(value)) or tensor_digest(value)
        self._token("tensor", f"{value.device.type} {value.stride()} {digest}")

    def _module(self, module: nn.Module) -> None:
        self._class(type(module))
        for kind in type(module).__mro__:  # a forward that was put in the place of a package's own
            for name, function in sorted(vars(kind).items()) if is_versioned(kind.__module__) else ():
                if isinstance(function, types.FunctionType):
                    self._token(name, bytecode(function.__code__))
                    if not is_versioned(function.__module__):
                        self._value(function)
        for place in _APART:
            self._mapping(vars(module)[place])
        self._mapping({name: value for name, value in vars(module).items() if name not in _IGNORED + _APART})
        for hooks in _FORWARD_HOOKS:
            with_keywords = vars(module)[f"{hooks}_with_kwargs"]
            for number, hook in vars(module)[hooks].items():
                if not _is_ours(hook):
                    self._token(hooks, number in with_keywords)
                    self._value(hook)

    def _callable(self, value: Any) -> bool:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._value(value.__func__)
            self._value(value.__self__)
        elif isinstance(value, functools.partial):
            self._token("partial", len(value.args))
            for part in (value.func, *value.args):
                self._value(part)
            self._mapping(value.keywords)
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
            self._token("builtin", value.__qualname__)
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, types.ModuleType):
                self._value(owner)
        elif isinstance(value, (staticmethod, classmethod)):
            self._value(value.__func__)
        elif isinstance(value, (property, functools.cached_property)):
            self._value(value.fget if isinstance(value, property) else value.func)
        elif isinstance(value, functools._lru_cache_wrapper):
            self._value(value.__wrapped__)
        else:
            return False
        return True

    def _function(self, value: types.FunctionType) -> None:
        self._token("function", value.__qualname__)
        self._token("code", bytecode(value.__code__))
        stands_for = getattr(value, "depends_on", None)
        if stands_for is not None:
            self._value(stands_for)
            return
        if is_versioned(value.__module__):
            self._package(value.__module__)
        else:
            self._reached.function(value)
        for one in (value.__defaults__, value.__kwdefaults__, *map(_held, value.__closure__ or ())):
            self._value(one)

    def _class(self, kind: type) -> None:
        self._token("class", f"{kind.__module__} {kind.__qualname__}")
        for base in kind.__mro__:
            if is_versioned(base.__module__):
                self._package(base.__module__)
            else:
                self._token("base", base.__qualname__)
                self._reached.class_(base)

    def _package(self, module: str | None) -> None:
        self._token("package", module)
        if is_versioned(module):
            self._packages.add(package_of(module))

    def _collection(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            self._token("mapping", type(value).__qualname__)
            self._mapping(value)
        elif type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            self._token(type(value).__qualname__, len(value))
            self._all(value)
        elif isinstance(value, (set, frozenset)):
            self._token("set", len(value))
            self._all(sorted(value, key=lambda one: (type(one).__name__, repr(one))))
        else:
            return False
        return True

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self._token("items", len(value))
        for key, one in value.items():
            self._value(key)
            try:
                self._value(one)
            except NotKnown as unknown:
                raise NotKnown(f"{key}, {unknown}" if isinstance(key, str) else str(unknown)) from None

    def _all(self, values: Sequence[Any]) -> None:
        for one in values:
            self._value(one)

    def _object(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, _SILENT) or any(package_of(base.__module__) in TRAINERS for base in kind.__mro__):
            self._token("silent", kind.__qualname__)
            return
        if isinstance(value, torch.Generator):
            raise NotKnown("a random generator")
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise NotKnown(f"an object of type {kind.__qualname__}, which cannot be pickled") from error
        self._token("object", f"{kind.__module__} {kind.__qualname__}")
        if isinstance(reduced, str):
            self._token("global", reduced)
            return
        made, arguments, *rest = reduced
        state, listed, mapped = (*rest, None, None, None)[:3]
        self._value(made)
        self._value(tuple(arguments))
        self._value(_described(state, kind))
        self._all(list(listed or ()))
        self._mapping(dict(mapped or ()))


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "nothing yet"


def _is_ours(hook: Any) -> bool:
    """True for hooks that this package has for the time of a quantization."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return package_of(getattr(hook, "__module__", None)) == "gptq_plugin"


def _described(state: Any, kind: type) -> Any:
    """The state of an object; of transformers' configurations without what loading and saving write into them."""
    if isinstance(state, dict) and any(package_of(base.__module__) == "transformers" for base in kind.__mro__):
        left_out = (*_NAMES_OF_MODELS, *(_WRITTEN_BY_SAVING if hasattr(kind, "model_type") else ()))
        return {name: value for name, value in state.items() if name not in left_out}
    return state
