"""`gptq-plugin check`: what a checkpoint is, what is wrong with it, and who takes it. Prints nothing.

Without the float model a checkpoint is held to what it says of itself: sym=True means that every zero is 2^(bits-1),
desc_act=false that channel i is in group i // group_size, padding is zero, and two descriptions say the same. With it,
every layer is compared with the weight it was made from (`comparison`), and every other tensor must be the float
model's, or that one cast to the checkpoint's dtype.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_plugin.check.comparison import compare, verdict
from gptq_plugin.check.float_weights import FloatWeights
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.files import CONFIG, QUANTIZE_CONFIG
from gptq_plugin.checkpoint.formats.format import trivial_g_idx
from gptq_plugin.clients.client import CLIENTS, Client
from gptq_plugin.clients.inventory import Inventory, LayerEntry
from gptq_plugin.clients.rules import conditions, problems
from gptq_plugin.config import QuantizeConfig, own_config
from gptq_plugin.errors import CheckpointError, some
from gptq_plugin.layers.packing import unpack_weight, unpack_zeros
from gptq_plugin.layers.qlinear import QuantLinear

# Of |mean(code − zero)| of a layer, in steps: weights average to nearly nothing, and a zero that is off by one to 1. In
# the quantizations of `comparison` it was at most 0.06 at 2 to 4 bits; at 8 bits, where steps are small, 0.48.
_OFF_CENTER = 0.5
_SAMPLED_ROWS = 256
_HUGE = 1000.0  # a scale over the layer's median


@dataclass(frozen=True)
class Finding:
    """One thing about the checkpoint: an ``"error"`` (numbers are wrong, or it cannot load) or a ``"warning"``."""

    level: str
    message: str


@dataclass
class Lint:
    """What `lint` found.

    Attributes:
        facts: What the checkpoint is, by heading.
        findings: In the order they were found.
        refusals: By client, why it does not take the checkpoint; an empty list where it does.
        conditions: By client, what it asks for beside it.
    """

    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    refusals: dict[Client, list[str]] = field(default_factory=dict)
    conditions: dict[Client, list[str]] = field(default_factory=dict)

    @property
    def errors(self) -> list[str]:
        return [finding.message for finding in self.findings if finding.level == "error"]

    def add(self, level: str, messages: Iterable[str]) -> None:
        self.findings += [Finding(level, message) for message in messages]


def lint(directory: str | Path, float_dir: str | Path | None = None, targets: Iterable[Client] | None = None) -> Lint:
    """Checks a GPTQ or compressed-tensors checkpoint, a layer at a time.

    Args:
        directory: The checkpoint.
        float_dir: The float model it was made from, a folder with safetensors files; None compares nothing.
        targets: The clients asked about; all of them when None.

    Raises:
        CheckpointError: `float_dir` cannot be read. What is wrong with `directory` is a finding.
    """
    found = Lint()
    floats = FloatWeights(float_dir) if float_dir is not None else None
    try:
        checkpoint = Checkpoint.open(directory)
    except CheckpointError as error:
        found.add("error", [str(error)])
        return found
    inventory = Inventory.of(checkpoint)
    found.facts = _facts(checkpoint, inventory)
    beside = checkpoint.quantize_config()
    found.add("error", _contradictions(checkpoint, beside))
    found.add("error", _tied_head(checkpoint, inventory))
    _scales_dtype(checkpoint, found)
    _missing_g_idx(checkpoint, found)
    judged = _Judged(checkpoint, beside, floats)
    for layer in inventory.layers:
        judged.layer(layer, checkpoint.read_layer(layer.name))
    judged.report(found)
    if floats is not None:
        _check_float_layers(checkpoint, floats, found)
    for target in targets if targets is not None else map(Client, CLIENTS):
        found.refusals[target] = [
            *problems(inventory, target),
            *target.rules.missing(inventory, checkpoint.quantization),
        ]
        found.conditions[target] = conditions(inventory, target)
    return found


# --- what the files say -------------------------------------------------------------------------------------


def _facts(checkpoint: Checkpoint, inventory: Inventory) -> dict[str, str]:
    grids = Counter((x.bits, x.group_size, x.sym, x.act_order) for x in inventory.layers)
    described = [
        f"{count} layers at {bits} bits, group_size={size}, {'symmetric' if sym else 'asymmetric'}"
        + (", act-order" if ordered else "")
        for (bits, size, sym, ordered), count in grids.most_common()
    ]
    sizes = {name: _bytes(entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
    total, float_bytes = sum(sizes.values()), sum(sizes[name] for name in checkpoint.float_names)
    architecture = (checkpoint.model_config.get("architectures") or [None])[0]
    return {
        "format": checkpoint.checkpoint_format,
        "model": str(architecture or checkpoint.model_config.get("module_class") or "unknown"),
        "layers": "; ".join(described),
        "left float": some(inventory.floats) if inventory.floats else "no linear layer inside the blocks",
        "bytes": f"{total:,}, of which {float_bytes / total:.0%} are float weights in {_short(inventory.dtype)}",
    }


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    digits = re.sub(r"\D.*", "", dtype.lstrip("BFIUOL")) or "8"  # safetensors' names: F16, BF16, I64, F8_E4M3, BOOL
    return math.prod(shape) * int(digits) // 8


def _contradictions(checkpoint: Checkpoint, beside: dict[str, Any]) -> Iterator[str]:
    said = checkpoint.quantization
    for key in checkpoint.format.repeated:
        if key in said and key in beside and said[key] != beside[key]:
            yield (
                f"{CONFIG} says {key}={said[key]!r} and {QUANTIZE_CONFIG} says {beside[key]!r}: clients read one or "
                "the other, so correct the wrong one"
            )


def _tied_head(checkpoint: Checkpoint, inventory: Inventory) -> Iterator[str]:
    parts = (checkpoint.model_config, checkpoint.model_config.get("text_config") or {})
    if inventory.lm_head and any(part.get("tie_word_embeddings") for part in parts):
        yield (
            "the output embedding is quantized and config.json ties it to the float input embedding, which loaders "
            "then take instead: set tie_word_embeddings to false"
        )


def _scales_dtype(checkpoint: Checkpoint, found: Lint) -> None:
    if not checkpoint.format.float16_scales:
        return
    kinds = Counter(checkpoint.tensors[f"{name}.{checkpoint.format.scales}"].dtype for name in checkpoint.layers)
    if kinds["BF16"]:
        found.add(
            "warning",
            [
                f"the scales of {kinds['BF16']} layers are bfloat16: if they were rounded from float16, weights moved "
                "by up to 0.4 % (compare with the float model to see); float16 is what GPTQ clients expect"
            ],
        )
    if kinds["F32"]:
        found.add(
            "warning",
            [
                f"the scales of {kinds['F32']} layers are float32 and hold float16 values: no number changes, but GPTQ "
                "clients expect float16"
            ],
        )


def _missing_g_idx(checkpoint: Checkpoint, found: Lint) -> None:
    without = [name for name, layer in checkpoint.layers.items() if not layer.has_g_idx]
    if without and checkpoint.format.always_g_idx:
        found.add(
            "warning",
            [
                f"{some(without)} have no g_idx: no number changes, since desc_act=false says i // group_size; "
                "transformers reports missing keys"
            ],
        )


def _check_float_layers(checkpoint: Checkpoint, floats: FloatWeights, found: Lint) -> None:
    """Embeddings, norms, biases, float layers: none of them is quantized, so each is the float model's, or its cast."""
    biases = [f"{name}.bias" for name, layer in checkpoint.layers.items() if layer.has_bias]
    same, alone = 0, []
    cast: Counter[str] = Counter()
    off: dict[str, float] = {}
    for name in [*checkpoint.float_names, *biases]:
        ours, theirs = checkpoint.read(name), floats.tensor(name)
        if theirs is None or theirs.shape != ours.shape:
            if name not in biases or ours.any():  # AutoGPTQ writes a bias of zeros where there is none
                alone.append(name)
            continue
        if not torch.equal(theirs.to(ours.dtype), ours):
            off[name] = float((ours.float() - theirs.float()).abs().max())
            continue
        same += 1
        if theirs.dtype != ours.dtype:
            cast[f"{_short(theirs.dtype)} to {_short(ours.dtype)}"] += 1
    casts = "".join(f", {count} of them cast from {kinds}" for kinds, count in cast.items())
    found.facts["compared"] += f"; {same} other tensors are equal{casts}"
    if off:
        worst = max(off, key=lambda name: off[name])
        found.add(
            "error",
            [
                f"{some(off)}: not quantized, and not the float model's values (the furthest is {worst}, by up to "
                f"{off[worst]:.3g}): another model, or damage"
            ],
        )
    if alone:
        found.add("warning", [f"{some(alone)}: the float model has no tensor of that name and shape, so not compared"])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- what the layers hold -----------------------------------------------------------------------------------


class _Judged:
    """Collects what is wrong with single layers, so that what is wrong with all of them is said once."""

    def __init__(self, checkpoint: Checkpoint, beside: dict[str, Any], floats: FloatWeights | None) -> None:
        self._checkpoint = checkpoint
        self._floats = floats
        self._config = own_config(beside)
        self._names: dict[tuple[str, str], list[str]] = {}
        self._compared: list[str] = []
        self._alone: list[str] = []

    def layer(self, inventory: LayerEntry, layer: QuantLinear) -> None:
        for level, message in self._of_itself(inventory, layer):
            self._say(level, message, inventory.name)
        if self._floats is None:
            return
        weight = self._floats.weight(inventory.name, (inventory.out_features, inventory.in_features))
        if weight is None:
            self._alone.append(inventory.name)
            return
        self._compared.append(inventory.name)
        config, ratios = self._grid_of(inventory)
        comparison = compare(layer, weight, config, ratios)
        scales = self._checkpoint.tensors[f"{inventory.name}.{self._checkpoint.format.scales}"]
        bfloat16 = scales.dtype == "BF16"
        for message in verdict(comparison, inventory.bits, bfloat16):
            self._say("error", message, inventory.name)

    def report(self, found: Lint) -> None:
        total = len(self._checkpoint.layers)
        for (level, message), names in self._names.items():
            which = f"all {total} layers" if len(names) == total > 1 else some(names)
            found.add(level, [f"{which}: {message}"])
        if self._floats is not None:
            found.facts["compared"] = f"{len(self._compared)} layers with those of {self._floats.directory}"
        if self._alone:
            found.add(
                "warning",
                [f"{some(self._alone)}: the float model has no weight of that name and shape, so not compared"],
            )

    def _say(self, level: str, message: str, name: str) -> None:
        self._names.setdefault((level, message), []).append(name)

    def _grid_of(self, inventory: LayerEntry) -> tuple[QuantizeConfig, tuple[float, ...]]:
        """The layer's grid; and the parts its groups' ranges may have, where the groups' steps come from the float
        weight: in our own checkpoints with static groups."""
        ours = self._config.for_module(inventory.name) if self._config is not None else None
        if ours is not None and ours.static_groups:
            return ours, ours.clip_ratios
        v1 = self._checkpoint.checkpoint_format == "gptq"
        return QuantizeConfig(bits=inventory.bits, sym=inventory.sym, checkpoint_format="gptq" if v1 else "gptq_v2"), ()

    def _of_itself(self, inventory: LayerEntry, layer: QuantLinear) -> Iterator[tuple[str, str]]:
        zeros = unpack_zeros(layer.qzeros, layer.bits, layer.out_features)
        yield from _zeros(inventory, zeros, self._checkpoint.checkpoint_format)
        yield from _groups(inventory, layer, self._checkpoint.layers[inventory.name].desc_act)
        yield from _scales(layer.scales)
        yield from _padding(layer)
        yield from _codes(layer, zeros)


def _zeros(inventory: LayerEntry, zeros: Tensor, checkpoint_format: str) -> Iterator[tuple[str, str]]:
    middle = 2 ** (inventory.bits - 1)
    if inventory.sym:
        wrong = zeros[zeros != middle]
        if len(wrong):
            value = int(wrong.mode().values)
            hint = ""
            if value == middle - 1 and checkpoint_format == "gptq_v2":
                hint = ", as in a file of format gptq (v1) that says gptq_v2"
            if value == middle + 1 and checkpoint_format == "gptq":
                hint = ", as in a file of format gptq_v2 that says gptq (v1)"
            yield (
                "error",
                f"sym=True says that every zero is {middle}, and most others here are {value}{hint}: weights are off "
                "by whole steps",
            )
    elif checkpoint_format == "gptq" and bool((zeros == 0).any()):
        yield "warning", "some zeros are 0, which format gptq (v1) stores as -1, and clients read differently"


def _groups(inventory: LayerEntry, layer: QuantLinear, desc_act: bool) -> Iterator[tuple[str, str]]:
    counts = torch.bincount(layer.g_idx.long(), minlength=layer.scales.shape[0])
    natural = trivial_g_idx(inventory.in_features, inventory.group_size)
    if inventory.act_order and not desc_act:
        yield (
            "error",
            "desc_act=false says that channel i is in group i // group_size, and g_idx says otherwise: clients that "
            "read it compute other weights than those that do not",
        )
    elif not torch.equal(counts, torch.bincount(natural.long(), minlength=len(counts))):
        yield "error", "g_idx puts more channels into some groups than group_size says, and fewer into others"


def _scales(scales: Tensor) -> Iterator[tuple[str, str]]:
    values = scales.float()
    if bool((values < 0).any()):
        yield "warning", "some scales are negative"
    if bool((values == 0).any()):
        yield "warning", "some scales are 0: their groups are all zeros"
    middle = float(values.abs().median())
    if float(values.abs().max()) > _HUGE * middle > 0:
        yield "warning", f"some scales are more than {_HUGE:.0f} times the layer's median"


def _padding(layer: QuantLinear) -> Iterator[tuple[str, str]]:
    """Bits behind the last code of a stream."""
    used = layer.in_features * layer.bits % 32
    if used and bool((layer.qweight[-1] & ~((1 << used) - 1)).any()):
        yield "warning", "the bits behind the last code are not zero: another packing, or damage"


def _codes(layer: QuantLinear, zeros: Tensor) -> Iterator[tuple[str, str]]:
    step = -(-layer.out_features // _SAMPLED_ROWS)
    codes = unpack_weight(layer.qweight[:, ::step].contiguous(), layer.bits, layer.in_features)
    if codes.numel() > 1 and bool((codes == codes.flatten()[0]).all()):
        yield "error", f"every code is {int(codes.flatten()[0])}: the file was not written, or is damaged"
        return
    mean = float((codes.float() - zeros[:, ::step].float().T[:, layer.g_idx.long()]).mean())
    if layer.bits <= 4 and abs(mean) > _OFF_CENTER:
        yield (
            "warning",
            f"codes average {mean:+.1f} from their zeros, where weights average to nearly nothing: zeros off by one "
            "look so; compare with the float model (--float)",
        )
