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

import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.checkpoint.files import (
    CONFIG,
    QUANTIZE_CONFIG,
    TAKEN_OVER,
    TensorEntry,
    description_in,
)
from gptq_plugin.checkpoint.formats.format import Format, QuantizedLayer, Scheme, contiguous
from gptq_plugin.checkpoint.formats.registry import stated_format
from gptq_plugin.checkpoint.layer_checks import FLOATS, StoredLayer, described_layer
from gptq_plugin.checkpoint.schema import check_description, check_model_config, read_checked
from gptq_plugin.checkpoint.shards import Shards
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.device.surroundings import plain_defaults
from gptq_plugin.errors import CheckpointError, lines, some
from gptq_plugin.layers.packed_together import empty_layer
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.options.fields import shown

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """An opened and checked checkpoint.

    Attributes:
        directory: Where it is.
        model_config: Content of ``config.json``; empty when there is none.
        quantization: The description: ``quantization_config`` of ``config.json``, else ``quantize_config.json``.
        quantize_config: Content of ``quantize_config.json``; empty when there is none.
        format: How its layers are stored.
        shards: Its files of tensors.
        layers: The quantized layers.
    """

    directory: Path
    model_config: dict[str, Any]
    quantization: dict[str, Any]
    quantize_config: dict[str, Any]
    format: Format
    shards: Shards
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)

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
        model_config = read_checked(directory / CONFIG, check_model_config) or {}
        beside = read_checked(directory / QUANTIZE_CONFIG, check_description)
        quantization, source = description_in(model_config, beside, directory)
        check_description(quantization, source)
        format_ = stated_format(quantization, source)
        if format_.repeated and beside is not None:
            problem = format_.contradiction(quantization, beside)
            if problem is not None:
                raise CheckpointError(f"{source} {problem}")
        base = quantization.get("model_file_base_name") or "model"
        if base != Path(base).name:
            raise CheckpointError(f"{source}: model_file_base_name must be the name of a file, got {shown(base)}")
        shards = Shards.open(directory, base)
        checkpoint = cls(directory, model_config, quantization, beside or {}, format_, shards)
        with plain_defaults():  # transformers opens it where tensors are made on the meta device
            checkpoint._find_layers()
        return checkpoint

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor in the files."""
        return self.shards.entries

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
        module, _, _ = name.rpartition(".")
        return any(above in self._taken_over for above in itertools.accumulate(module.split("."), "{}.{}".format))

    @functools.cached_property
    def _taken_over(self) -> frozenset[str]:
        ours = (self.quantization.get("meta") or {}).get(QUANTIZER_NAME) or {}
        return frozenset(ours.get(TAKEN_OVER) or ())

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the largest tensor that is not quantized; float16 when there is none."""
        entries = [self.tensors[n] for n in self.float_names if self.tensors[n].dtype in FLOATS]
        largest = max(entries, key=lambda entry: math.prod(entry.shape), default=None)
        return FLOATS[largest.dtype] if largest is not None else torch.float16

    def read(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU."""
        return self.shards.read(name)

    def lazy(self, name: str) -> Any:
        """One tensor as safetensors' slice, not read yet: transformers' loader reads it."""
        return self.shards.lazy(name)

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
        sizes = layer.in_features, layer.out_features, layer.bits, layer.group_size
        module = empty_layer(*sizes, dtype, bias=layer.has_bias)
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
                f"{self.directory} lacks {len(missing)} tensors of quantized layers: {some(missing, 20)}. "
                "The checkpoint is incomplete: fetch all of its files again, or export the model again"
            )
        owned = {f"{name}.{suffix}" for name in names for suffix in self.format.suffixes}
        problems = [
            f"{name} is {entry.dtype}, no float, and belongs to no quantized layer ({entry.file.name})"
            for name, entry in self.tensors.items()
            if name not in owned and name.rpartition(".")[2] in ("weight", "bias") and entry.dtype not in FLOATS
        ]
        scheme_of = self.format.schemes(self.quantization)
        for name in names:
            layer = self._layer(name, scheme_of, problems)
            if layer is not None:
                self.layers[name] = layer
        if problems:
            raise CheckpointError(
                f"{self.directory} contradicts its own description:{lines(problems)}\n"
                f"Correct the description in {CONFIG} and {QUANTIZE_CONFIG}, or fetch the checkpoint again"
            )
        derived = [layer.name for layer in self.layers.values() if not layer.has_g_idx]
        if derived and self.format.always_g_idx:
            logger.warning(
                "%s stores no g_idx for %s: input channel i is taken to be in group i // group_size",
                self.directory,
                some(derived),
            )

    def _layer(self, name: str, scheme_of: Callable[[str], Scheme], problems: list[str]) -> QuantizedLayer | None:
        """The layer; None if something does not fit, which is added to `problems`."""
        try:
            scheme = scheme_of(name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            return None
        entries = {s: self.tensors[f"{name}.{s}"] for s in self.format.suffixes if f"{name}.{s}" in self.tensors}
        stored = StoredLayer(name, self.format, entries, functools.cache(lambda suffix: self.read(f"{name}.{suffix}")))
        return described_layer(stored, scheme, problems)
