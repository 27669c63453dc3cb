"""Tensors of the folder a model came from that transformers does not load: `Unloaded`.

Some models are published with modules that only servers know, such as the layers that predict several tokens ("mtp.*").
transformers leaves them out, and config.json goes on announcing them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from gptq_plugin.checkpoint.files import CONFIG, INDEX, WEIGHTS, TensorEntry, read_json
from gptq_plugin.checkpoint.layer_checks import FLOATS
from gptq_plugin.checkpoint.many_modules import refuse_many_modules
from gptq_plugin.checkpoint.shards import Shards
from gptq_plugin.errors import CheckpointError, ExportError, brief, some
from gptq_plugin.model.hf_models import is_transformers, published_class, without_weights
from gptq_plugin.model.stored_names import key_renaming

_SOURCE = (
    "the model came from {}, which is looked through for modules that transformers does not load, and is damaged: {}. "
    "Mend it, or clear model.config._name_or_path, and nothing is taken over from there"
)


@dataclass(frozen=True)
class Unloaded:
    """Tensors of modules that transformers does not make, in the safetensors files of a model's source.

    The source is the folder in the model's ``name_or_path``, or the snapshot of that hub id in the local cache, if its
    config.json names the model's class: another class was chosen to leave something out. Layers that were taken out of
    the model afterwards are not meant: a model made from the source's configuration has them.

    Attributes:
        tensors: By their names there.
        modules: The outermost of those modules.
        shards: The source's files.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    shards: Shards = field(default_factory=Shards, repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Unloaded:
        """Finds those of a model; none of other than transformers models.

        Raises:
            ExportError: One is quantized, or the files are damaged, so that they cannot be taken over.
        """
        folder = _source(model) if is_transformers(model) else None
        shards = _shards(folder) if folder is not None else Shards()
        found = _lacking(model, shards.entries)
        if folder is None or not found:
            return cls()
        found = _lacking(_as_published(model, folder, shards), {k: v for own in found.values() for k, v in own.items()})
        found = {module: own for module, own in found.items() if any(len(one.shape) > 1 for one in own.values())}
        tensors = {name: entry for own in found.values() for name, entry in own.items()}
        other = sorted({one.dtype for one in tensors.values() if one.dtype not in FLOATS})
        if other:
            raise ExportError(
                f"{folder} holds {some(list(found))}, which transformers does not load, in {', '.join(other)}: only "
                "float tensors can be taken over into the export. Clear model.config._name_or_path to leave them out, "
                "and remove what announces them from model.config"
            )
        return cls(tensors, list(found), shards)

    @property
    def layers(self) -> list[str]:
        """Those that have a matrix for a weight, which clients take for quantized unless told."""
        matrices = (name for name, entry in self.tensors.items() if len(entry.shape) == 2)
        return [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]

    def read(self, name: str) -> Tensor:
        """One of the tensors, on the CPU."""
        return self.shards.read(name)

    def sentences(self) -> list[str]:
        """For the report."""
        return [
            f"{len(self.tensors)} tensors of {some(self.modules)}, which transformers does not load, are taken over "
            "float from the model's source"
        ][: len(self.modules)]


def _source(model: Any) -> Path | None:
    name = getattr(model.config, "_name_or_path", None)
    if not name:
        return None
    folder = Path(name)
    if not folder.is_dir():
        try:
            config = try_to_load_from_cache(name, CONFIG, revision=getattr(model.config, "_commit_hash", None))
        except HFValidationError:
            return None
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    try:
        named = read_json(folder / CONFIG).get("architectures")
    except CheckpointError:
        return None
    own = (published_class(model) or type(model)).__name__
    return folder if isinstance(named, list) and own in named else None


def _as_published(model: Any, folder: Path, shards: Shards) -> nn.Module:
    """A model made from the source's configuration, without values.

    Raises:
        ExportError: There is none that can be made.
    """
    kind = published_class(model) or type(model)
    try:
        refuse_many_modules(read_json(folder / CONFIG), folder / CONFIG, shards.entries.values())
        made: nn.Module = without_weights(kind, type(model.config).from_pretrained(folder))
    except Exception as error:  # whatever values that nobody expected lead to
        raise ExportError(
            _SOURCE.format(folder, f"{folder / CONFIG} ({type(error).__name__}: {brief(error)})")
        ) from error
    return made


def _lacking(model: nn.Module, entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Those of tensors that belong to modules a model does not have, by the outermost of these."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    state, rename = model.state_dict(), key_renaming(model)
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        if name in state:
            continue
        names = [name, *rename(name)]
        if not any(one in state for one in names) and all(_first_lacking(one, modules) for one in names):
            found.setdefault(_first_lacking(name, modules), {})[name] = entry
    return found


def _shards(folder: Path) -> Shards:
    """The safetensors files of a model's source; none if its weights are in files of another kind.

    Raises:
        ExportError: They are damaged, or some are missing.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return Shards()
    try:
        return Shards.open(folder)
    except CheckpointError as error:
        raise ExportError(_SOURCE.format(folder, error)) from error


def _first_lacking(tensor: str, modules: Set[str]) -> str:
    """The outermost module on the way to a tensor that is not there; empty if all are."""
    parts = tensor.split(".")[:-1]
    return next((name for i in range(len(parts)) if (name := ".".join(parts[: i + 1])) not in modules), "")
