"""Reads the folder of a sharded checkpoint in one process: PyTorch's distributed checkpoint, as Lightning writes it.

Its index is a pickle, from which PyTorch would run any code. Here it may only name the classes of an index.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from gptq_plugin.lightning.checksums import check_archive
from gptq_plugin.lightning.unpickler import BoundedUnpickler
from gptq_plugin.options.limited_files import SPARSE, is_mostly_holes

INDEX = ".metadata"

_NAMES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its home in Python 3.13
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def sharded_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Returns the sizes and dtypes (``properties``) of the tensors in the folder, by name.

    Raises:
        pickle.UnpicklingError: The index names other classes or functions than those of an index.
    """
    entries = _Reader(folder).read_metadata().state_dict_metadata
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors of the stored shapes, of any floating dtype, by name; no process group is needed.

    Raises:
        Exception: A shard is missing, truncated or corrupt; the type depends on the damage.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended here
        reader = _Reader(folder)
        _check_sums(folder, reader.read_metadata(), tensors)
        try:
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # a BaseException around the exception of each rank
            raise error.failures[0][0] from error


def _check_sums(folder: Path, metadata: Metadata, names: Container[str]) -> None:
    """Reads the parts of these tensors once, each an archive of its own.

    Raises:
        zipfile.BadZipFile: One is not what was written.
    """
    for index, info in (metadata.storage_data or {}).items():
        if index.fqn in names:
            with (folder / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                check_archive(io.BytesIO(file.read(info.length)))


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        _refuse_holes(Path(self.path, INDEX))
        with Path(self.path, INDEX).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        outside = {
            info.relative_path
            for info in (metadata.storage_data or {}).values()
            if info.relative_path != Path(info.relative_path).name or not Path(self.path, info.relative_path).is_file()
        }
        if outside:  # or no file: opening a pipe would wait for ever
            raise pickle.UnpicklingError(f"its index names {sorted(outside)[0]!r}, which is no file of the folder")
        for name in sorted({info.relative_path for info in (metadata.storage_data or {}).values()}):
            _refuse_holes(Path(self.path, name))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _refuse_holes(file: Path) -> None:
    if is_mostly_holes(file):
        raise pickle.UnpicklingError(f"{file.name} {SPARSE}")


class _Unpickler(BoundedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which is not part of one")
