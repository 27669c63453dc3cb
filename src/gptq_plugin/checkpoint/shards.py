"""Tensors in the safetensors files of a folder, found by their headers and read one at a time: `Shards`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_plugin.checkpoint.files import INDEX, WEIGHTS, TensorEntry, is_regular, read_json
from gptq_plugin.checkpoint.schema import check_index
from gptq_plugin.errors import CheckpointError, brief, some
from gptq_plugin.options import fields
from gptq_plugin.options.fields import shown
from gptq_plugin.options.limited_files import SPARSE, is_mostly_holes

_LONGEST_NAME = 1000  # of a tensor, in letters
_MOST_EMPTY = 1000
_LONGEST_FILE_NAME = 255  # bytes


@dataclass
class Shards:
    """The tensors, by name. Where several files have one, the index decides.

    Attributes:
        entries: Each where it is read from.
        elsewhere: Names that another file has too.
    """

    entries: dict[str, TensorEntry] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, directory: Path, base: str = "model") -> Shards:
        """Opens the files: one of the name `base`, those of an index, or the only one there is.

        Raises:
            CheckpointError: A file is missing, damaged, or contradicts the index.
        """
        shards = cls()
        listed = _listed(directory, base)
        for file, promised in listed.items():
            shards._scan(file, promised, {name: home for home, names in listed.items() for name in names})
        return shards

    def read(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU.

        Raises:
            CheckpointError: It cannot be read.
        """
        entry = self.entries[name]
        try:
            tensor: Tensor = self._handles[entry.file].get_tensor(name)
        except Exception as error:  # safetensors and torch each raise their own kinds
            raise CheckpointError(f"{entry.file}: {name} ({entry.dtype}) cannot be read: {brief(error)}") from error
        return tensor

    def lazy(self, name: str) -> Any:
        """One tensor as safetensors' slice, not read yet: transformers' loader reads it."""
        return self._handles[self.entries[name].file].get_slice(name)

    def _scan(self, file: Path, promised: Iterable[str], home: dict[str, Path]) -> None:
        """Opens one file and records its tensors, less those that the index lists in another."""
        if not is_regular(file):
            raise CheckpointError(
                f"{file} does not exist or is no regular file"
                + (f", and {INDEX} lists {some(promised)} in it" if promised else "")
                + ": fetch or copy it again, or export the model again"
            )
        if is_mostly_holes(file):
            raise CheckpointError(f"{file} ({file.stat().st_size} bytes) {SPARSE}")
        found: dict[str, TensorEntry] = {}
        try:
            handle = safe_open(str(file), framework="pt", device="cpu")
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                piece = handle.get_slice(name)
                found[name] = TensorEntry(file, piece.get_dtype(), tuple(piece.get_shape()))
        except MemoryError as error:
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) is larger than what this process may address: {brief(error)}"
            ) from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) is truncated or corrupt, since safetensors cannot read it "
                f"({brief(error)}): fetch or copy it again, or export the model again"
            ) from error
        _check_entries(file, found)
        missing = sorted(set(promised) - set(found))
        if missing:
            raise CheckpointError(f"{file} lacks {some(missing)}, which {INDEX} lists in it: fetch it again")
        here = {name: entry for name, entry in found.items() if home.get(name, file) == file}
        twice = sorted(set(here) & set(self.entries))
        if twice:
            raise CheckpointError(
                f"{file} and {self.entries[twice[0]].file.name} both hold {some(twice)}, which {INDEX} does not list: "
                "fetch the files again, or export the model again"
            )
        self.entries.update(here)
        self.elsewhere.update(found.keys() - here.keys())
        self._handles[file] = handle


def _check_entries(file: Path, found: Mapping[str, TensorEntry]) -> None:
    """Refuses tensors that no tool writes."""
    strange = [name for name in found if not name.isprintable() or len(name) > _LONGEST_NAME]
    if strange:
        raise CheckpointError(
            f"{file} has a tensor named {fields.shown(strange[0])}: names have printable letters, at most "
            f"{_LONGEST_NAME}. It is damaged, or made to mislead"
        )
    empty = [name for name, entry in found.items() if 0 in entry.shape]
    if len(empty) > _MOST_EMPTY:
        raise CheckpointError(
            f"{file} has {len(empty)} tensors without values ({some(empty)}), and no tool writes as many. It is "
            "damaged, or made to mislead"
        )


def _listed(directory: Path, base: str) -> dict[Path, list[str]]:
    """The safetensors files, each with the tensors that an index lists for it.

    Raises:
        CheckpointError: There is not one file or one index, or the index is damaged.
    """
    named = directory / INDEX
    indices = [named] if os.path.lexists(named) else sorted(directory.glob("*.safetensors.index.json"))
    if indices and not is_regular(directory / WEIGHTS):
        index = read_json(indices[0])
        check_index(index, indices[0])
        if not index.get("weight_map"):
            raise CheckpointError(f"{indices[0]} has no weight_map: fetch it again, or export the model again")
        files: dict[Path, list[str]] = {}
        for name, shard in index["weight_map"].items():
            _check_name(shard, indices[0], f"weight_map lists {brief(name, 200)} in {shown(shard)}")
            files.setdefault(directory / shard, []).append(name)
        return files
    found = [directory / f"{base}.safetensors"]
    if not is_regular(found[0]):
        found = sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{directory} should hold its weights in one {WEIGHTS}, or in shards listed by {INDEX}; it has "
            f"{some(file.name for file in found) or 'no safetensors file'}"
        )
    return {found[0]: []}


def _check_name(name: str, file: Path, what: str) -> None:
    """Refuses what is not the name of a file in its folder."""
    if not name or name != Path(name).name or name == ".." or len(os.fsencode(name)) > _LONGEST_FILE_NAME:
        raise CheckpointError(
            f"{file}: {what}, which is not the name of a file of this folder: fetch it again, or export the model again"
        )
