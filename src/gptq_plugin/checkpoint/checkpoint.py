"""A quantized checkpoint on disk: what it says of itself, checked before a single weight is used.

Reads the JSON files and the headers of the safetensors files (a few kilobytes, whatever the model's size) and
the group indices, and proves that they agree: every quantized layer complete, of the shapes its bits and
group size ask for, every group index in range. All complaints are collected, so that one error names
everything that is wrong.

Files of GPTQModel, AutoGPTQ (``quantize_config.json``, ``gptq_model-4bit-128g.safetensors``), llm-compressor
(compressed-tensors) and this package are read alike; `layouts` and `schemes` know how they differ. Knows no model
and no transformers; `load` puts models around it and `export` reads its own work back.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_plugin.checkpoint.layouts import FLOAT, LAYOUTS, Layout, QuantizedLayer, contiguous
from gptq_plugin.checkpoint.schemes import Scheme, checkpoint_format, scheme
from gptq_plugin.config import COMPRESSED
from gptq_plugin.errors import CheckpointError, some
from gptq_plugin.layers.qlinear import QuantLinear

logger = logging.getLogger(__name__)

CONFIG = "config.json"
QUANTIZE_CONFIG = "quantize_config.json"  # the name AutoGPTQ gave it, read by every tool
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HALF = "F16"
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header of its file describes it; `dtype` is safetensors' name, such as ``"F16"``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """An opened and checked checkpoint.

    Attributes:
        directory: Where it is.
        model_config: Content of ``config.json``; empty when there is none.
        quantization: The description: ``quantization_config`` of ``config.json``, else ``quantize_config.json``.
        checkpoint_format: ``"gptq"`` (v1), ``"gptq_v2"`` or ``"compressed-tensors"``.
        tensors: Every tensor in the files.
        layers: The quantized layers.
    """

    directory: Path
    model_config: dict[str, Any]
    quantization: dict[str, Any]
    checkpoint_format: str
    tensors: dict[str, TensorEntry]
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Reads and checks the checkpoint in `directory`.

        Raises:
            CheckpointError: The folder, a file, a tensor or the description is missing, corrupt or
                contradicts the others; the message names all of them and says what to do.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a folder: give the folder that holds {CONFIG} and the weights")
        model_config = _read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
        quantization, source = _description(directory, model_config)
        checkpoint = cls(directory, model_config, quantization, checkpoint_format(quantization, source), {})
        for file, promised in _weight_files(directory, quantization).items():
            checkpoint._scan(file, promised)
        checkpoint._find_layers()
        return checkpoint

    @property
    def layout(self) -> Layout:
        """How the layers lie in the files."""
        return LAYOUTS[self.checkpoint_format]

    @property
    def float_names(self) -> list[str]:
        """The tensors that belong to no quantized layer."""
        owned = {f"{name}.{suffix}" for name in self.layers for suffix in self.layout.suffixes}
        return [name for name in self.tensors if name not in owned]

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the largest tensor that is not quantized; float16 when there is none."""
        entries = [self.tensors[n] for n in self.float_names if self.tensors[n].dtype in _FLOATS]
        largest = max(entries, key=lambda entry: math.prod(entry.shape), default=None)
        return _FLOATS[largest.dtype] if largest is not None else torch.float16

    def quantize_config(self) -> dict[str, Any]:
        """quantize_config.json, where there is one that can be read; else empty."""
        try:
            return _read_json(self.directory / QUANTIZE_CONFIG)
        except CheckpointError:
            return {}

    def read(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU."""
        tensor: Tensor = self._handles[self.tensors[name].file].get_tensor(name)
        return tensor

    def lazy(self, name: str) -> Any:
        """One tensor, not read yet: safetensors' slice, which transformers' loader reads in its turn."""
        return self._handles[self.tensors[name].file].get_slice(name)

    def read_layer(
        self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> QuantLinear:
        """The quantized layer `name` as a module, its zeros converted to true zeros.

        Args:
            name: A key of `layers`.
            dtype: Of the bias; as stored when None.
            device: Where the layer goes.
        """
        layer = self.layers[name]
        tensors = self.read_tensors(name)
        bias = tensors.get("bias")
        dtype = dtype or (bias.dtype if bias is not None else torch.float16)
        module = QuantLinear(
            layer.in_features,
            layer.out_features,
            layer.bits,
            layer.group_size,
            bias=layer.has_bias,
            dtype=dtype,
            device=torch.device("meta"),
        )
        for key, tensor in tensors.items():
            setattr(module, key, (tensor.to(dtype) if key == "bias" else tensor).to(device).contiguous())
        return module

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The quantized layer's tensors as a QuantLinear holds them, on the CPU; a bias in its own dtype."""
        return self.layout.from_file(lambda suffix: self.read(f"{name}.{suffix}"), self.layers[name])

    def scheme(self, name: str) -> Scheme:
        """How a layer is quantized; `desc_act` only if its groups really are not contiguous."""
        layer = self.layers[name]
        act_order = layer.has_g_idx and not contiguous(self.read(f"{name}.{self.layout.g_idx}"), layer.group_size)
        return Scheme(layer.bits, layer.group_size, layer.sym, act_order)

    def _scan(self, file: Path, promised: Iterable[str]) -> None:
        """Opens one weights file and records its tensors."""
        if not file.is_file():
            raise CheckpointError(
                f"{file} does not exist, but {INDEX} says it holds {some(promised)}: "
                "fetch or copy the missing file, or export the model again"
            )
        try:
            handle = safe_open(str(file), framework="pt", device="cpu")
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                piece = handle.get_slice(name)
                self.tensors[name] = TensorEntry(file, piece.get_dtype(), tuple(piece.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) cannot be read as safetensors, so it is truncated "
                "or corrupt "
                f"({error}): fetch or copy it again, or export the model again"
            ) from error
        self._handles[file] = handle
        missing = sorted(set(promised) - {name for name, entry in self.tensors.items() if entry.file == file})
        if missing:
            raise CheckpointError(f"{file} lacks {', '.join(missing)}, which {INDEX} says it holds: fetch it again")

    def _find_layers(self) -> None:
        layout = self.layout
        names = dict.fromkeys(n.rpartition(".")[0] for n in self.tensors if n.rpartition(".")[2] in layout.marks)
        if not names:
            raise CheckpointError(
                f"{self.directory} describes {self.checkpoint_format} weights but holds no tensor named "
                f"NAME.{layout.codes}; it has {some(self.tensors)}. If the model is not quantized, load it with "
                "transformers"
            )
        missing = [
            f"{name}.{suffix}" for name in names for suffix in layout.needed if f"{name}.{suffix}" not in self.tensors
        ]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} tensors of quantized layers: {', '.join(missing)}. "
                "The checkpoint is incomplete: fetch all of its files again, or export the model again"
            )
        problems: list[str] = []
        for name in names:
            layer = self._layer(name, problems)
            if layer is not None:
                self.layers[name] = layer
        if problems:
            raise CheckpointError(
                f"{self.directory} contradicts its own description:\n  " + "\n  ".join(problems) + "\n"
                f"Correct the description in {CONFIG} and {QUANTIZE_CONFIG}, or take the checkpoint from "
                "its source again"
            )
        derived = [layer.name for layer in self.layers.values() if not layer.has_g_idx]
        if derived and self.checkpoint_format != COMPRESSED:
            logger.warning(
                "%s stores no g_idx for %s: input channel i is taken to be in group i // group_size",
                self.directory,
                some(derived),
            )

    def _layer(self, name: str, problems: list[str]) -> QuantizedLayer | None:
        """The layer, or None after saying in `problems` what does not fit."""
        before, layout = len(problems), self.layout
        try:
            rule = scheme(self.quantization, name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            return None
        found = {s: self.tensors[f"{name}.{s}"] for s in layout.suffixes if f"{name}.{s}" in self.tensors}
        kinds = layout.expected(1, 1, 1, rule.bits, rule.sym)
        for suffix, entry in found.items():
            if suffix not in kinds:
                problems.append(f"{name}.{suffix} is there, and the description says sym=True ({entry.file.name})")
                continue
            kind, dimensions = kinds[suffix][0], len(kinds[suffix][1])
            if (FLOAT if entry.dtype in _FLOATS else entry.dtype) != kind:
                problems.append(f"{name}.{suffix} is {entry.dtype}, not {kind} ({entry.file.name})")
            elif len(entry.shape) != dimensions:
                problems.append(f"{name}.{suffix} has shape {list(entry.shape)}, not {dimensions} dimensions")
        if len(problems) > before:
            return None
        shapes = {suffix: entry.shape for suffix, entry in found.items()}
        in_features, out_features = layout.sizes(shapes, rule.bits, lambda suffix: self.read(f"{name}.{suffix}"))
        groups = 1 if rule.group_size == -1 else -(-in_features // rule.group_size)
        says = f"bits={rule.bits}, group_size={rule.group_size}"
        expected = layout.expected(in_features, out_features, groups, rule.bits, rule.sym)
        for suffix, (_, shape) in expected.items():
            if suffix not in found:
                if suffix not in (layout.g_idx, "bias"):
                    problems.append(f"{name}.{suffix} is missing, and the description says sym=False")
            elif found[suffix].shape != shape:
                problems.append(
                    f"{name}.{suffix} has shape {list(found[suffix].shape)}; {says} with {in_features} inputs and "
                    f"{out_features} outputs needs {list(shape)} ({found[suffix].file.name})"
                    + layout.hint(suffix, found[suffix].shape, in_features, rule.bits)
                )
        has_g_idx = layout.g_idx in found
        if not has_g_idx and groups > 1 and rule.desc_act:
            problems.append(
                f"{name}.{layout.g_idx} is missing, and with desc_act=true the groups cannot be told without it"
            )
        if len(problems) == before:
            self._check_values(name, groups, problems)
        if len(problems) > before:
            return None
        return QuantizedLayer(
            name,
            rule.bits,
            rule.group_size,
            in_features,
            out_features,
            groups,
            has_g_idx,
            "bias" in found,
            rule.sym,
            rule.desc_act,
        )

    def _check_values(self, name: str, groups: int, problems: list[str]) -> None:
        g_idx = self.tensors.get(f"{name}.{self.layout.g_idx}")
        if g_idx is not None:
            low, high = (int(value) for value in self.read(f"{name}.{self.layout.g_idx}").aminmax())
            if low < 0 or high >= groups:
                problems.append(
                    f"{name}.{self.layout.g_idx} holds values from {low} to {high}; with {groups} groups they must lie "
                    f"in 0..{groups - 1} ({g_idx.file.name})"
                )
        scales = f"{name}.{self.layout.scales}"
        entry, stored = self.tensors[scales], self.read(scales)
        if not bool(stored.isfinite().all()):
            problems.append(f"{scales} holds NaN or infinity ({entry.file.name})")
        elif entry.dtype != _HALF and not torch.equal(stored.half().to(stored.dtype), stored):
            problems.append(f"{scales} is {entry.dtype} with values float16 cannot hold ({entry.file.name})")


def _description(directory: Path, model_config: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The description and the file it comes from."""
    text_config = model_config.get("text_config") or {}
    inside = model_config.get("quantization_config") or text_config.get("quantization_config")
    beside = directory / QUANTIZE_CONFIG
    if inside is not None:
        quantization, source = inside, directory / CONFIG
        if isinstance(inside, dict) and inside.get("quant_method") != COMPRESSED and beside.is_file():
            _refuse_two_formats(source, inside, beside, _read_json(beside))
    elif beside.is_file():
        quantization, source = {"quant_method": "gptq", **_read_json(beside)}, beside
    else:
        raise CheckpointError(
            f"{directory} has neither a quantization_config in {CONFIG} nor a {QUANTIZE_CONFIG}, so it is "
            "no quantized "
            "checkpoint. A float model is loaded with transformers"
        )
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{source}: the quantization description must be an object, got {quantization!r}")
    return quantization, source


def _refuse_two_formats(file: Path, inside: Mapping[str, Any], beside: Path, outside: Mapping[str, Any]) -> None:
    """optimum 2.3.0's `GPTQQuantizer.save` writes v1 zeros, says so in quantize_config.json, and not in config.json."""
    one, other = (said.get("checkpoint_format") or said.get("format") for said in (inside, outside))
    if one and other and one != other:
        raise CheckpointError(
            f"{file} says the format is {one!r} and {beside.name} says {other!r}, and the zeros of one read as the "
            "other are off by one. Correct the wrong one: symmetric zeros are stored as 2^(bits-1) - 1 in 'gptq' "
            "(0x77777777 at 4 bits) and as 2^(bits-1) in 'gptq_v2' (0x88888888)"
        )


def _weight_files(directory: Path, quantization: Mapping[str, Any]) -> dict[Path, list[str]]:
    """The safetensors files, each with the tensors an index says it holds."""
    indices = (
        [directory / INDEX] if (directory / INDEX).is_file() else sorted(directory.glob("*.safetensors.index.json"))
    )
    if indices and not (directory / WEIGHTS).is_file():
        weight_map = _read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{indices[0]} has no weight_map: fetch it again, or export the model again")
        files: dict[Path, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(
                    f"{indices[0]}: {name} is said to be in {shard!r}, which is no file of this folder"
                )
            files.setdefault(directory / shard, []).append(name)
        return files
    base = quantization.get("model_file_base_name") or "model"
    named = directory / f"{base}.safetensors"
    found = [named] if named.is_file() else sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{directory} should hold its weights in one {WEIGHTS}, or in shards listed by {INDEX}; it has "
            f"{some(file.name for file in found) or 'no safetensors file'}"
        )
    return {found[0]: []}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}): fetch it again, or export again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content
