"""Reads the file of a Lightning checkpoint, whatever its hyperparameters are, and runs nothing from it.

Beside the weights such a file holds what users gave their modules and callbacks: OmegaConf nodes, paths, classes and
functions of their own. PyTorch's restricted unpickler refuses all of these, its other one imports and calls them.
Here tensors and plain values are read, and everything else becomes a `StandIn`, which does nothing.
"""

from __future__ import annotations

import pickle
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch

from gptq_plugin.errors import CheckpointError, brief, some
from gptq_plugin.lightning.checksums import check_pickle, check_tensors

# None of these runs anything, whatever its arguments are.
_CONTAINERS = {"bytearray", "complex", "frozenset", "set"}
_PLAIN: dict[str, set[str]] = {
    "builtins": _CONTAINERS,
    "__builtin__": _CONTAINERS,  # in pickles before protocol 3
    "collections": {"OrderedDict"},
    "torch": {"Size", "device"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage"},
    "torch._utils": {
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_parameter",
        "_rebuild_sparse_tensor",
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
    },
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Returns the content of a checkpoint, on the CPU: tensors and plain values as they are, else stand-ins.

    Raises:
        FileNotFoundError: The file does not exist.
        CheckpointError: It is no checkpoint, or has no ``state_dict``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        content = _load(path)
    except Exception as error:  # pickle, zip and torch each raise their own kinds
        advice = str(error).find("weights_only")  # torch's, which would run what the file holds
        what = str(error) if advice < 0 else "it holds more than tensors and plain values"
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {brief(what)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} has no state_dict: it is not a Lightning checkpoint")
    others = [key for key in content["state_dict"] if not isinstance(key, str)]
    if others:
        raise CheckpointError(f"{path}: state_dict has {some(map(repr, others))} among its names: it is damaged")
    try:
        _check_tensors(path, content["state_dict"])
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy it again") from error
    return content


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


def _load(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # PyTorch's format before 1.6
        if tarfile.is_tarfile(path):  # before 0.1.10, which PyTorch would unpack
            raise pickle.UnpicklingError("it is a tar archive")
        return torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        check_pickle(archive)
        if any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist()):
            raise pickle.UnpicklingError("it is a TorchScript program")
    inert = types.ModuleType("inert_pickle")  # in place of `pickle`
    inert.Unpickler = _Unpickler  # type: ignore[attr-defined]
    return torch.load(path, map_location="cpu", pickle_module=inert, weights_only=False)


def _check_tensors(path: Path, state: dict[str, Any]) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_tensors(archive, [value for value in state.values() if isinstance(value, torch.Tensor)])


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python, whose steps can be replaced."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _bytes
        kind = getattr(torch, name, None) if module == "torch" else None
        if isinstance(kind, torch.dtype) or name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        return type(name.rpartition(".")[2], (StandIn,), {"stands_for": f"{module}.{name}"})

    def load_build(self) -> None:
        """Gives an object its state: only the metadata of a state_dict is kept."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state, built = stack.pop(), stack[-1]
        if type(built) is OrderedDict and isinstance(state, dict):
            built.__dict__.update(state)

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Bytes, as pickles before protocol 3 write them."""
    return text.encode("latin1")
