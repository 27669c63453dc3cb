"""Reads the file of a Lightning checkpoint, whatever its hyperparameters are, and runs nothing from it.

Beside the weights such a file holds what users gave their modules and callbacks: OmegaConf nodes, paths, classes and
functions of their own. PyTorch's restricted unpickler refuses all of these, its other one imports and calls them.
Here tensors and plain values are read, and everything else becomes a `StandIn`, which does nothing (`unpickler`).
"""

from __future__ import annotations

import os
import pickle
import tarfile
import types
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gptq_plugin.errors import CheckpointError, brief, some
from gptq_plugin.lightning.checksums import check_pickle, check_tensors
from gptq_plugin.lightning.unpickler import InertUnpickler
from gptq_plugin.options import fields
from gptq_plugin.options.limited_files import SPARSE, is_mostly_holes


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Returns the content of a checkpoint, on the CPU: tensors and plain values as they are, else stand-ins.

    Raises:
        FileNotFoundError: The file does not exist.
        CheckpointError: It is no checkpoint, or has no ``state_dict``.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if is_mostly_holes(path):
        raise CheckpointError(f"{path} {SPARSE}")
    try:
        content = _load(path)
    except Exception as error:  # pickle, zip and torch each raise their own kinds
        what = str(error) if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {brief(what)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} has no state_dict: it is not a Lightning checkpoint")
    others = [key for key in content["state_dict"] if not isinstance(key, str)]
    if others:
        raise CheckpointError(
            f"{path}: state_dict has {some(map(fields.shown, others))} among its names: it is damaged"
        )
    try:
        _check_tensors(path, content["state_dict"])
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged: {brief(error)}. Copy it again") from error
    return content


def has_other_weights(path: str | Path, state: Mapping[str, Any]) -> bool:
    """Returns whether a tensor of a checkpoint differs from that of the same name in `state`. Its file is mapped.

    False for one that cannot be read here.
    """
    try:
        stored = _load(Path(path), mmap=True)["state_dict"]
        pairs = [(stored[name], own) for name, own in state.items() if isinstance(stored.get(name), torch.Tensor)]
        return not all(torch.equal(one, own.detach().cpu()) for one, own in pairs if isinstance(own, torch.Tensor))
    except Exception:  # noqa: BLE001  folders, other file systems, and what `read_checkpoint` refuses
        return False


def _load(path: Path, *, mmap: bool = False) -> Any:
    size = path.stat().st_size
    made: dict[str, Any] = {"file_bytes": size}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            made["records"] = _storages(archive.infolist(), size)
            check_pickle(archive)
    elif tarfile.is_tarfile(path):  # before 0.1.10, which PyTorch would unpack
        raise pickle.UnpicklingError("it is a tar archive")
    inert = types.ModuleType("inert_pickle")  # in place of `pickle`
    unpickler = type("Unpickler", (InertUnpickler,), made)
    inert.Unpickler = unpickler  # type: ignore[attr-defined]
    inert.load = lambda file, **options: unpickler(file, **options).load()  # type: ignore[attr-defined]
    return torch.load(path, map_location="cpu", pickle_module=inert, weights_only=False, mmap=mmap)


def _check_tensors(path: Path, state: dict[str, Any]) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_tensors(archive, [value for value in state.values() if isinstance(value, torch.Tensor)])


def _storages(entries: Sequence[zipfile.ZipInfo], size: int) -> dict[str, int]:
    """Bytes of an archive's storages, by key.

    Raises:
        pickle.UnpicklingError: It is none that `torch.save` writes.
    """
    if any(entry.filename.rpartition("/")[2] == "constants.pkl" for entry in entries):
        raise pickle.UnpicklingError("it is a TorchScript program")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise pickle.UnpicklingError("it is compressed, which PyTorch's checkpoints never are")
    if len({entry.filename for entry in entries}) < len(entries) or sum(entry.file_size for entry in entries) > size:
        raise pickle.UnpicklingError("records of its archive have one name, or lie in one another")
    storages = (entry for entry in entries if entry.filename.split("/")[1:-1] == ["data"])
    return {entry.filename.rpartition("/")[2]: entry.file_size for entry in storages}
