"""Weights of the float model a checkpoint was made from, read one at a time: `FloatWeights`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from gptq_plugin.cache.digests import tensor_digest
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.checkpoint.layer_checks import FLOATS
from gptq_plugin.checkpoint.shards import Shards
from gptq_plugin.device.finite import all_finite
from gptq_plugin.errors import CheckpointError, brief

_LONGEST_PREFIX = 4  # parts of a name


class FloatWeights:
    """The weights in a folder of safetensors files, sharded or not.

    Args:
        name: The folder, as `save_pretrained` writes it, or the id of a repository on the hub.
        token: For a private or gated repository.

    Raises:
        CheckpointError: No such folder or repository, no safetensors file, or one that cannot be read.
    """

    def __init__(self, name: str | Path, token: str | bool | None = None) -> None:
        self.name = str(name)
        folder = local_folder(name, token=token)
        try:
            self._shards = Shards.open(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} of the float model cannot be read: {brief(error)}") from error
        self._read: dict[str, str] = {}  # name here, by the name asked for
        # See `expect`.
        self._prefixes: Counter[tuple[str, str]] = Counter()
        self._nearest: dict[str, tuple[bool, int, int]] = {}
        self._without_prefix: dict[str, list[str]] = {}
        for name in self._shards.entries:
            for rest in _rests(name):
                self._without_prefix.setdefault(rest, []).append(name)
        # Conv1D's weight is transposed and has the name of Linear's: the first matrix that is not square tells which.
        self._transposed = False

    def expect(self, names: Iterable[str]) -> None:
        """Counts the prefixes by which names that will be asked for differ from those here. A name that fits several
        tensors means the one by the most frequent prefix; one tensor that fits several names is that of the nearest."""
        fits = [(name, wanted) for wanted in names for name in self._fitting(wanted)]
        self._prefixes.update(_prefixes(*both) for both in fits)
        for name, wanted in fits:
            nearness = self._nearness(name, wanted)
            self._nearest[name] = max(nearness, self._nearest.get(name, nearness))

    def tensor(self, wanted: str) -> Tensor | None:
        """The tensor of that name, or None.

        A base model's names lack the prefix (``model.``) of classes with a head, or the other way round. A name that
        fits several tensors gives None, unless `expect` told which.
        """
        name = self._named(wanted)
        return None if name is None else self._shards.read(name)

    def bias(self, layer: str) -> Tensor | None:
        """The bias beside the weight of the layer of that name, or None."""
        weight = self._named(f"{layer}.weight")
        name = None if weight is None else f"{weight.removesuffix('weight')}bias"
        if name not in self._shards.entries:
            return None
        self._read[f"{layer}.bias"] = name
        return self._shards.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor of exactly that name."""
        return tuple(self._shards.entries[name].shape)

    def unread(self) -> dict[str, str]:
        """The tensors that were not asked for, below the prefix of those that were, and whose values are not those of
        one that was, as a tied weight's are; by their names, those that would be asked for."""
        prefixes = Counter(_prefixes(name, wanted) for wanted, name in self._read.items())
        read = set(self._read.values())
        left: dict[str, str] = {}
        for ours, theirs in dict(prefixes.most_common()):
            found = (name for name in self._shards.entries if name not in read and name.startswith(ours))
            left = {name: theirs + name.removeprefix(ours) for name in found} | left
        shapes = {self._shards.entries[name].shape for name in left}
        alike = (name for name in read if self._shards.entries[name].shape in shapes)
        known = {tensor_digest(self._shards.read(name)) for name in alike}
        return {name: wanted for name, wanted in left.items() if tensor_digest(self._shards.read(name)) not in known}

    def _named(self, wanted: str) -> str | None:
        near = {name: self._nearness(name, wanted) for name in self._fitting(wanted)}
        counts = {name: known[1] for name, known in near.items() if known >= self._nearest.get(name, known)}
        names = [name for name, count in counts.items() if count == max(counts.values())]
        if len(names) != 1:
            return None
        self._read[wanted] = names[0]
        return names[0]

    def _nearness(self, name: str, wanted: str) -> tuple[bool, int, int]:
        prefixes = _prefixes(name, wanted)
        return name == wanted, self._prefixes[prefixes], -len("".join(prefixes))

    def _fitting(self, wanted: str) -> list[str]:
        if wanted in self._shards.entries:
            return [wanted]
        shorter = [rest for rest in _rests(wanted) if rest in self._shards.entries]
        return [*shorter, *self._without_prefix.get(wanted, [])]

    def weight(self, layer: str, shape: tuple[int, int]) -> Tensor | None:
        """The weight of the layer of that name, [out, in] = `shape`, or None.

        Raises:
            CheckpointError: It holds no floats, or NaN or infinity.
        """
        name = self._named(f"{layer}.weight")
        if name is None:
            return None
        entry, tensor = self._shards.entries[name], self._shards.read(name)
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{entry.file} of the float model: {name} is {entry.dtype}, with which nothing can be compared: give "
                f"the model in one of {', '.join(FLOATS)}"
            )
        if not all_finite(tensor):
            raise CheckpointError(
                f"{entry.file} of the float model: {name} holds NaN or infinity, with which nothing can be compared: "
                "fetch it again, or give the model that was quantized"
            )
        if tensor.shape == shape[::-1] and shape[0] != shape[1]:
            self._transposed = True
        if self._transposed:
            tensor = tensor.T
        return tensor if tensor.shape == shape else None


def _rests(name: str) -> list[str]:
    """What follows the first parts of a dotted name."""
    parts = name.split(".", _LONGEST_PREFIX)
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _prefixes(name: str, wanted: str) -> tuple[str, str]:
    """What two names, one of which ends in the other, begin with apart from that."""
    return (name.removesuffix(wanted), "") if name.endswith(wanted) else ("", wanted.removesuffix(name))
