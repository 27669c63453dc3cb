"""Compares a checkpoint with the float model it was made from: `BesideFloat`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.check.comparison import compare, verdict
from gptq_plugin.check.described import short
from gptq_plugin.check.findings import Finding, error, warning
from gptq_plugin.check.float_weights import FloatWeights
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.clients.inventory import LayerEntry
from gptq_plugin.config import QuantizeConfig, our_meta, own_config
from gptq_plugin.errors import some
from gptq_plugin.layers.qlinear import QuantLinear

_LEAST_STEP = 2.0**-22  # four times float16's smallest number: below it scales are off by more than 12 %


class BesideFloat:
    """A checkpoint beside its float model: `layer` for every quantized layer, then `rest` once.

    Attributes:
        summary: What was compared, after `rest`.
    """

    def __init__(self, checkpoint: Checkpoint, floats: FloatWeights) -> None:
        self.summary = ""
        self._checkpoint = checkpoint
        self._floats = floats
        self._config = own_config(checkpoint.quantize_config)
        self._is_finished = _is_finished(checkpoint.quantize_config)
        self._compared: set[str] = set()
        self._unknown: dict[str, tuple[int, ...]] = {}  # shapes
        self._floats.expect([*checkpoint.float_names, *(f"{name}.weight" for name in checkpoint.layers)])

    def layer(self, entry: LayerEntry, layer: QuantLinear) -> Iterator[Finding]:
        """Compares a layer with its float weight."""
        weight = self._floats.weight(entry.name, (entry.out_features, entry.in_features))
        if weight is None:
            self._unknown[entry.name] = (entry.out_features, entry.in_features)
            return
        self._compared.add(entry.name)
        if max(_step(weight, entry.bits), float(layer.scales.max())) < _LEAST_STEP:
            yield warning("weights are so small that float16, in which scales are stored, loses most of them")
            return
        comparison = compare(layer, weight, *self._grid_of(entry))
        scales = self._checkpoint.tensors[f"{entry.name}.{self._checkpoint.format.scales}"]
        for message in verdict(comparison, entry.bits, bfloat16_scales=scales.dtype == "BF16"):
            yield error(message)

    def has_compared(self, entry: LayerEntry) -> bool:
        """True after a call of `layer` if the float model has the layer's weight."""
        return entry.name in self._compared

    def rest(self) -> Iterator[Finding]:
        """Compares embeddings, norms, biases and float layers, which must be the float model's, or cast from them.

        Norms that a finish trained are told in the summary, with how far they moved.
        """
        if self._unknown:
            yield warning(
                f"{some(self._unknown)}: the float model has no weight of that name and shape, so not compared"
            )
        lost = [name for name, layer in self._checkpoint.layers.items() if not layer.has_bias and self._has_bias(name)]
        if lost:
            yield error(f"{some(lost)}: the float model has a bias there, and the checkpoint has none: it was lost")
        biases = {f"{name}.bias": name for name, layer in self._checkpoint.layers.items() if layer.has_bias}
        same = 0
        unknown: dict[str, tuple[int, ...]] = {}
        cast: Counter[str] = Counter()
        off: dict[str, float] = {}
        trained: dict[str, float] = {}
        for name in [*self._checkpoint.float_names, *biases]:
            ours = self._checkpoint.read(name)
            theirs = self._floats.bias(biases[name]) if name in biases else self._floats.tensor(name)
            if theirs is None or theirs.shape != ours.shape:
                if name not in biases or ours.any():  # AutoGPTQ writes a bias of zeros where there is none
                    unknown[name] = tuple(ours.shape)
                continue
            if not torch.equal(theirs.to(ours.dtype), ours):
                moved = trained if self._is_finished and self._is_of_norm(name) else off
                moved[name] = float((ours.float() - theirs.float()).abs().max())
                continue
            same += 1
            if theirs.dtype != ours.dtype:
                cast[f"{short(theirs.dtype)} to {short(ours.dtype)}"] += 1
        casts = "".join(f", {count} of them cast from {kinds}" for kinds, count in cast.items())
        self.summary = (
            f"{len(self._compared)} layers with those of {self._floats.name}; {same} other tensors are equal{casts}"
        )
        if trained:
            self.summary += f"; {len(trained)} of norms were trained, and moved by up to {max(trained.values()):.3g}"
        if off:
            worst = max(off, key=lambda name: off[name])
            yield error(
                f"{some(off)}: not quantized, and not the float model's values (the furthest is {worst}, by up to "
                f"{off[worst]:.3g}): another model, or damage"
            )
        if unknown:
            yield warning(f"{some(unknown)}: the float model has no tensor of that name and shape, so not compared")
        missing = self._lost({**{f"{name}.weight": shape for name, shape in self._unknown.items()}, **unknown})
        if missing:
            yield error(f"{some(missing)}: in the float model, and not in the checkpoint: lost, or of another model")

    def _lost(self, unknown: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The float model's tensors that the checkpoint of a plain module lacks. `fit` tells those of a transformers
        model.

        Args:
            unknown: Names that the float model has not, with their shapes. Nothing beside them is taken for lost, since
                experts, say, may be apart here and together there; nor what has their shape: of the names of a tied
                weight there may be another.
        """
        if self._checkpoint.model_config.get("architectures"):
            return []
        left = ((name, "".join(wanted.rpartition(".")[:2])) for name, wanted in self._floats.unread().items())
        lost = [name for name, beside in left if not any(one.startswith(beside) for one in unknown)]
        return [name for name in lost if self._floats.shape(name) not in unknown.values()]

    def _has_bias(self, layer: str) -> bool:
        """True if the float model has one that is not all zeros."""
        bias = self._floats.bias(layer)
        return bias is not None and bool(bias.any())

    def _is_of_norm(self, name: str) -> bool:
        """True for a vector beside, or that is, the weight of a module whose weight is a vector."""
        weight = f"{name.rpartition('.')[0]}.weight"
        tensors = self._checkpoint.tensors
        return all(one in tensors and len(tensors[one].shape) == 1 for one in (name, weight))

    def _grid_of(self, entry: LayerEntry) -> tuple[QuantizeConfig, tuple[float, ...]]:
        """The layer's grid, and the clip ratios of its groups if these come from the float weight: in our own
        checkpoints with static groups, unless scales were improved or trained."""
        ours = self._config.for_module(entry.name) if self._config is not None else None
        if ours is not None:
            return ours, ours.clip_ratios if ours.keeps_ratios and not self._is_finished else ()
        v1 = self._checkpoint.checkpoint_format == "gptq"
        return QuantizeConfig(bits=entry.bits, sym=entry.sym, checkpoint_format="gptq" if v1 else "gptq_v2"), ()


def _is_finished(values: Mapping[str, Any]) -> bool:
    """True if scales and norms were trained after quantization, by a ``quantize_config.json`` of this package."""
    finish = our_meta(values).get("finish")
    return isinstance(finish, Mapping) and finish.get("kept") is True


def _step(weight: Tensor, bits: int) -> float:
    """The step of a symmetric grid that covers a weight."""
    return 2 * float(weight.abs().max()) / (2**bits - 1)
