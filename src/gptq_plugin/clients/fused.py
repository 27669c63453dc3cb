"""Layers that clients compute as one and what these must share: q, k and v; gate and up; a block of experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptq_plugin.clients.common import listed, nearest_group
from gptq_plugin.clients.inventory import Inventory, LayerEntry
from gptq_plugin.model.experts import block_of_experts
from gptq_plugin.model.fused_names import fused_name
from gptq_plugin.options.rules import matching_rules

# An expert's layers as checkpoints name them; the second three are Mixtral's and its descendants'.
EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class FusedSet:
    """Layers that become one: its name there, the quantized members and the names of the float ones."""

    name: str
    layers: tuple[LayerEntry, ...]
    floats: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]


def fused_sets(inventory: Inventory) -> list[FusedSet]:
    """The projections that servers fuse."""
    return _sets(inventory, fused_name)


def expert_blocks(inventory: Inventory) -> list[FusedSet]:
    """The blocks of experts."""
    return _sets(inventory, block_of_experts)


def fused(inventory: Inventory, client: str) -> Iterator[str]:
    """read (gptq_utils.py, is_layer_gptq_quantized; compressed_tensors/utils.py): all members alike, or none."""
    partly, mixed = [], []
    for set_ in fused_sets(inventory):
        if set_.layers and set_.floats:
            partly.append(f"{listed(list(set_.floats))} (beside {listed(set_.names)})")
        if len({(x.bits, x.group_size, x.sym) for x in set_.layers}) > 1:
            mixed.append(" and ".join(f"{x.name} (bits={x.bits}, group_size={x.group_size})" for x in set_.layers))
    if partly:
        yield (
            f"{listed(partly)} left float: {client} fuses these layers, so that all or none must be quantized: name "
            "all of them in modules_to_not_convert, or none"
        )
    if mixed:
        yield f"{listed(mixed)}: {client} fuses these layers, which must have one width, group size and symmetry"


def fused_rules(inventory: Inventory) -> Iterator[str]:
    """read (gptq_utils.py, get_dynamic_override): rules are matched with the fused layer's name."""
    lost = []
    for set_ in fused_sets(inventory):
        grids = {(x.bits, x.group_size) for x in set_.layers}
        if len(grids) != 1:
            continue
        own, whole = _rule(inventory, set_.names[0]), _rule(inventory, set_.name)
        if any(own.get(key) != whole.get(key) for key in ("bits", "group_size", "sym")):
            lost += set_.names
    if lost:
        yield (
            f"{listed(lost)}: their `dynamic` rule does not match the fused layer's name (qkv_proj, gate_up_proj), "
            "which servers look up: add the same rule for that name, or use checkpoint_format='compressed-tensors'"
        )


def expert_names(inventory: Inventory, client: str, known: tuple[str, ...]) -> Iterator[str]:
    """Experts' layers under names that a client does not know."""
    blocks = expert_blocks(inventory)
    names = [name for block in blocks for name in block.names if name.rpartition(".")[2] not in known]
    if names:
        yield (
            f"{listed(names)}: {client} knows experts' layers as {', '.join(known)}: name them in "
            "modules_to_not_convert, or use load_quantized"
        )


def expert_grids(inventory: Inventory, why: str) -> Iterator[str]:
    """Blocks of experts of which some have another grid than others, or are float."""
    for block in expert_blocks(inventory):
        grids = {(x.bits, x.group_size, x.sym): x.name for x in block.layers}
        have = [f"{name} (bits={b}, group_size={g}, sym={s})" for (b, g, s), name in grids.items()]
        have += [f"{name} (float)" for name in block.floats[:1]]
        if block.layers and len(have) > 1:
            yield (
                f"{', '.join(have)}: {why} alike: write `dynamic` rules that match all layers of {block.name}, and "
                f"{nearest_group(inventory, block.names, 1)} where one does not divide all inputs"
            )


def _sets(inventory: Inventory, name_of: Callable[[str], str | None]) -> list[FusedSet]:
    """The layers for which `name_of` gives a name, by that name."""
    layers: dict[str, list[LayerEntry]] = defaultdict(list)
    floats: dict[str, list[str]] = defaultdict(list)
    for layer in inventory.layers:
        layers[name_of(layer.name) or ""].append(layer)
    for name in inventory.floats:
        floats[name_of(name) or ""].append(name)
    return [FusedSet(name, tuple(layers[name]), tuple(floats[name])) for name in sorted({*layers, *floats} - {""})]


def _rule(inventory: Inventory, name: str) -> Mapping[str, Any]:
    return next((inventory.rules[pattern] for pattern in matching_rules(inventory.rules, name)), {})
