"""A quantized checkpoint on disk, checked against its own description before a weight is used.

Reads the JSON files and the headers of the safetensors files (a few kilobytes, whatever the model's size) and
the group indices, and proves that they agree: every quantized layer complete, of the shapes its bits and
group size ask for, every group index in range. All complaints are collected, so that one error names
everything that is wrong.

Files of GPTQModel, AutoGPTQ (``quantize_config.json``, ``gptq_model-4bit-128g.safetensors``), llm-compressor
(compressed-tensors) and this package are read alike; `formats` holds the differences. Knows no model
and no transformers; `load` puts models around it and `export` reads its own work back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_plugin.checkpoint.files import (
    CONFIG,
    INDEX,
    QUANTIZE_CONFIG,
    TAKEN_OVER,
    TensorEntry,
    description_in,
    read_json,
    weight_files,
)
from gptq_plugin.checkpoint.formats.format import Format, QuantizedLayer, Scheme, contiguous
from gptq_plugin.checkpoint.formats.registry import stated_format
from gptq_plugin.checkpoint.layer_checks import FLOATS, StoredLayer, described_layer
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.errors import CheckpointError, some
from gptq_plugin.layers.qlinear import QuantLinear

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """An opened and checked checkpoint.

    Attributes:
        directory: Where it is.
        model_config: Content of ``config.json``; empty when there is none.
        quantization: The description: ``quantization_config`` of ``config.json``, else ``quantize_config.json``.
        format: How its layers are stored.
        tensors: Every tensor in the files.
        layers: The quantized layers.
    """

    directory: Path
    model_config: dict[str, Any]
    quantization: dict[str, Any]
    format: Format
    tensors: dict[str, TensorEntry]
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Reads and checks the checkpoint in `directory`.

        Raises:
            CheckpointError: The folder, a file, a tensor or the description is missing, corrupt or
                contradicts the others; the message names all of them and the remedy.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a folder: give the folder that holds {CONFIG} and the weights")
        model_config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
        quantization, source = description_in(directory, model_config)
        format_ = stated_format(quantization, source)
        beside = directory / QUANTIZE_CONFIG
        if format_.repeated and beside.is_file():
            problem = format_.contradiction(quantization, read_json(beside))
            if problem is not None:
                raise CheckpointError(f"{source} {problem}")
        checkpoint = cls(directory, model_config, quantization, format_, {})
        for file, promised in weight_files(directory, quantization).items():
            checkpoint._scan(file, promised)
        checkpoint._find_layers()
        return checkpoint

    @property
    def checkpoint_format(self) -> str:
        """The format's name."""
        return self.format.name

    @property
    def float_names(self) -> list[str]:
        """The tensors that belong to no quantized layer."""
        owned = {f"{name}.{suffix}" for name in self.layers for suffix in self.format.suffixes}
        return [name for name in self.tensors if name not in owned]

    def is_taken_over(self, name: str) -> bool:
        """True for a tensor of a module that transformers does not make, as the export that wrote it noted."""
        ours = (self.quantization.get("meta") or {}).get(QUANTIZER_NAME) or {}
        return any(name.startswith(f"{module}.") for module in ours.get(TAKEN_OVER) or ())

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the largest tensor that is not quantized; float16 when there is none."""
        entries = [self.tensors[n] for n in self.float_names if self.tensors[n].dtype in FLOATS]
        largest = max(entries, key=lambda entry: math.prod(entry.shape), default=None)
        return FLOATS[largest.dtype] if largest is not None else torch.float16

    def quantize_config(self) -> dict[str, Any]:
        """The content of quantize_config.json; empty if there is none, or it cannot be read."""
        try:
            return read_json(self.directory / QUANTIZE_CONFIG)
        except CheckpointError:
            return {}

    def read(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU."""
        tensor: Tensor = self._handles[self.tensors[name].file].get_tensor(name)
        return tensor

    def lazy(self, name: str) -> Any:
        """One tensor as safetensors' slice, not read yet: transformers' loader reads it."""
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
        return self.format.from_file(lambda suffix: self.read(f"{name}.{suffix}"), self.layers[name])

    def scheme(self, name: str) -> Scheme:
        """The scheme of a layer; `desc_act` only if its groups are not contiguous."""
        layer = self.layers[name]
        act_order = layer.has_g_idx and not contiguous(self.read(f"{name}.{self.format.g_idx}"), layer.group_size)
        return Scheme(layer.bits, layer.group_size, layer.sym, act_order)

    def _scan(self, file: Path, promised: Iterable[str]) -> None:
        """Opens one weights file and records its tensors."""
        if not file.is_file():
            raise CheckpointError(
                f"{file} does not exist, and {INDEX} lists {some(promised)} in it: "
                "fetch or copy the missing file, or export the model again"
            )
        try:
            handle = safe_open(str(file), framework="pt", device="cpu")
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                piece = handle.get_slice(name)
                self.tensors[name] = TensorEntry(file, piece.get_dtype(), tuple(piece.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) is truncated or corrupt, since safetensors cannot read it "
                f"({error}): fetch or copy it again, or export the model again"
            ) from error
        self._handles[file] = handle
        missing = sorted(set(promised) - {name for name, entry in self.tensors.items() if entry.file == file})
        if missing:
            raise CheckpointError(f"{file} lacks {', '.join(missing)}, which {INDEX} lists in it: fetch it again")

    def _find_layers(self) -> None:
        names = dict.fromkeys(n.rpartition(".")[0] for n in self.tensors if n.rpartition(".")[2] in self.format.marks)
        if not names:
            raise CheckpointError(
                f"{self.directory} describes {self.checkpoint_format} weights but holds no tensor named "
                f"NAME.{self.format.codes}; it has {some(self.tensors)}. If the model is not quantized, load it with "
                "transformers"
            )
        needed = [f"{name}.{suffix}" for name in names for suffix in self.format.needed]
        missing = [name for name in needed if name not in self.tensors]
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
                f"Correct the description in {CONFIG} and {QUANTIZE_CONFIG}, or fetch the checkpoint again"
            )
        derived = [layer.name for layer in self.layers.values() if not layer.has_g_idx]
        if derived and self.format.always_g_idx:
            logger.warning(
                "%s stores no g_idx for %s: input channel i is taken to be in group i // group_size",
                self.directory,
                some(derived),
            )

    def _layer(self, name: str, problems: list[str]) -> QuantizedLayer | None:
        """The layer; None if something does not fit, which is added to `problems`."""
        try:
            scheme = self.format.scheme(self.quantization, name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            return None
        entries = {s: self.tensors[f"{name}.{s}"] for s in self.format.suffixes if f"{name}.{s}" in self.tensors}
        stored = StoredLayer(name, self.format, entries, lambda suffix: self.read(f"{name}.{suffix}"))
        return described_layer(stored, scheme, problems)
