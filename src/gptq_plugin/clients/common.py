"""Rules that several clients share: widths, groups, the output embedding, tensor parallelism.

The source of each fact stands beside it, here and in the clients' modules, which name the versions:

- *measured*: run on a CPU;
- *read*: only read in the client's source, not run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gptq_plugin.clients.inventory import Inventory, LayerEntry
from gptq_plugin.config import COMPRESSED
from gptq_plugin.errors import some

# read (vLLM's marlin_utils.py): its GPTQ class asks Marlin's list whatever kernel it takes; sglang's has the same one.
_MARLIN_GROUPS = (-1, 32, 64, 128)
# read (qlinear/torch.py, the kernel GPTQModel ends with; transformers loads GPTQ through it): or a layer's whole input.
_TORCH_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
# Under tensor parallelism these are cut along their inputs, all others along their outputs.
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2", "fc_out", "c_proj", "dense", "dense_4h_to_h", "wo", "w2")
_REPEATED = ("k_proj", "v_proj")  # key and value heads are copied where there are fewer than ranks


def of_layers(inventory: Inventory, wrong: Callable[[LayerEntry], bool], why: str) -> Iterator[str]:
    """A sentence that names the layers for which `wrong` is true, their grids and `why`."""
    names = [layer.name for layer in inventory.layers if wrong(layer)]
    if names:
        grids = sorted({(x.bits, x.group_size, x.sym) for x in inventory.layers if wrong(x)})
        have = ", ".join(f"bits={b} group_size={g} sym={s}" for b, g, s in grids[:3])
        yield f"{listed(names, inventory)} ({have}): {why}"


def listed(names: list[str], inventory: Inventory | None = None) -> str:
    """The first of the names, or "all N layers" where these are all of the inventory's."""
    total = len(inventory.layers) if inventory is not None else 0
    return f"all {total} layers" if len(names) == total > 1 else some(names, 3)


def marlin_groups(inventory: Inventory, client: str) -> Iterator[str]:
    """Group sizes that Marlin does not take."""
    for size, names in by(inventory, lambda x: x.group_size).items():
        if size not in _MARLIN_GROUPS:
            yield (
                f"{listed(names, inventory)}: {client} takes group_size -1, 32, 64 and 128, not {size}: use "
                f"{nearest_group(inventory, names, 1)}"
            )


def torch_groups(inventory: Inventory, client: str) -> Iterator[str]:
    """Group sizes that GPTQModel's PyTorch kernel does not take."""
    sizes = ", ".join(map(str, _TORCH_GROUPS))
    for (size, whole), names in by(inventory, lambda x: (x.group_size, x.group_size == x.in_features)).items():
        if size not in _TORCH_GROUPS and not whole:
            yield (
                f"{listed(names, inventory)}: {client} takes group_size {sizes} or a layer's "
                f"whole input, not {size}: use {nearest_group(inventory, names, 1)}"
            )


def ragged(inventory: Inventory, client: str) -> Iterator[str]:
    """Layers whose last group is not full."""
    names = [x.name for x in inventory.layers if x.group_size > 0 and x.in_features % x.group_size]
    if names:
        yield (
            f"{listed(names, inventory)}: {client} ignores a last group that is not full: use "
            f"{nearest_group(inventory, names, 1)}"
        )


def head(inventory: Inventory, client: str) -> Iterator[str]:
    """A quantized output embedding."""
    if inventory.lm_head:
        yield f"the output embedding is quantized, which {client} does not load: use lm_head=False"


def parallel(inventory: Inventory, ranks: int, client: str) -> Iterator[str]:
    """read (marlin.py, compressed_tensors_wNa16.py, marlin_utils.py): every rank has whole groups and whole words."""
    if ranks == 1:
        return
    for x in inventory.layers:
        last = x.name.rpartition(".")[2]
        if last in ROW_PARALLEL:
            part, left = divmod(x.in_features, ranks)
            if left or part * x.bits % 32:
                yield f"{x.name}: {client} cannot share {x.in_features} inputs among {ranks} ranks: use fewer ranks"
            elif x.group_size != -1 and x.group_size < x.in_features and part % x.group_size:
                yield (
                    f"{x.name}: group_size {x.group_size} does not divide the {part} inputs of each of {ranks} ranks: "
                    f"use {nearest_group(inventory, [x.name], ranks)}, or fewer ranks"
                )
            elif x.group_size == x.in_features:
                yield f"{x.name}: its only group spans {ranks} ranks: use group_size=-1, which {client} repeats on each"
        elif last not in _REPEATED and (x.out_features % ranks or x.out_features // ranks * x.bits % 32):
            yield f"{x.name}: {client} cannot share {x.out_features} outputs among {ranks} ranks: use fewer ranks"


def whole_rows(inventory: Inventory) -> Iterator[str]:
    """A condition of GPTQModel's kernels."""
    if inventory.checkpoint_format != COMPRESSED and any(layer.group_size == -1 for layer in inventory.layers):
        yield "group_size=-1 needs backend='torch' (its automatic kernel fails; measured on a CPU)"


def bfloat16_scales(inventory: Inventory) -> Iterator[str]:
    """A condition of servers, whose scales have the dtype of the activations."""
    if inventory.dtype == torch.bfloat16:
        yield "in bfloat16 it rounds the scales to 8 bits of mantissa; dtype=float16 keeps them"


def missing_keys(inventory: Inventory, description: Mapping[str, Any], client: str) -> Iterator[str]:
    """measured: keys that servers need in the description of a GPTQ checkpoint."""
    if inventory.checkpoint_format == COMPRESSED:
        return
    missing = [key for key in ("bits", "group_size", "desc_act", "sym") if key not in description]
    if missing:
        yield f"the description lacks {', '.join(missing)}, which {client} needs: add them to config.json"


def by(inventory: Inventory, key: Callable[[LayerEntry], Any]) -> dict[Any, list[str]]:
    """The layers' names, grouped by `key`."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for layer in inventory.layers:
        groups[key(layer)].append(layer.name)
    return groups


def nearest_group(inventory: Inventory, names: list[str], ranks: int) -> str:
    """The largest group size every client takes that divides each rank's inputs of these layers."""
    parts = [layer.in_features // ranks for layer in inventory.layers if layer.name in names]
    size = next((size for size in (128, 64, 32) if all(part % size == 0 for part in parts)), -1)
    return f"group_size={size}"
