"""sglang's rules: read in its source, nothing was run.

Read were ``srt/layers/quantization/gptq.py`` and ``marlin_utils.py`` at commit 006d096, and
``compressed_tensors/schemes/compressed_tensors_wNa16.py`` at 255632e.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from gptq_plugin.clients import common, fused
from gptq_plugin.clients.client import Rules
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.config import COMPRESSED


def _problems(inventory: Inventory, ranks: int) -> Iterator[str]:
    yield from common.of_layers(inventory, lambda x: x.bits not in (4, 8), "sglang reads 4 and 8 bits only: use bits=4")
    yield from (_compressed if inventory.checkpoint_format == COMPRESSED else _gptq)(inventory)
    yield from common.marlin_groups(inventory, "sglang")
    yield from common.ragged(inventory, "sglang")
    yield from _tiles(inventory, ranks)
    yield from fused.fused(inventory, "sglang")
    yield from common.parallel(inventory, ranks, "sglang")
    yield from common.head(inventory, "sglang")


def _compressed(inventory: Inventory) -> Iterator[str]:
    yield from common.of_layers(
        inventory,
        lambda x: not x.sym and x.bits == 8,
        "sglang has no kernel for asymmetric 8-bit weights: use sym=True, or bits=4",
    )


def _gptq(inventory: Inventory) -> Iterator[str]:
    # Besides Marlin it has only a kernel for 4 bits and v1's zeros, in float16.
    yield from common.of_layers(
        inventory,
        lambda x: not x.sym and x.bits in (4, 8),
        "sglang's kernel for GPTQ takes sym=True only: use sym=True, or at 4 bits "
        "checkpoint_format='compressed-tensors'",
    )
    whole = [set_ for set_ in fused.fused_sets(inventory) if set_.floats and not set_.layers]
    if whole:
        yield (
            f"{common.listed([n for set_ in whole for n in set_.floats])}: sglang fuses these into one layer, and "
            "GPTQ's rules that leave them float do not match its name: use checkpoint_format='compressed-tensors', or "
            "quantize them"
        )
    yield from fused.fused_rules(inventory)


def _tiles(inventory: Inventory, ranks: int) -> Iterator[str]:
    """read (sglang's marlin_utils.py): Marlin without padding. vLLM 0.32 pads to its tiles (marlin_padded_nk)."""
    sets = fused.fused_sets(inventory)
    joined = {name: sum(x.out_features for x in set_.layers) for set_ in sets for name in set_.names}
    names = []
    for x in inventory.layers:
        row = x.name.rpartition(".")[2] in common.ROW_PARALLEL
        inputs = x.in_features // (ranks if row else 1)
        outputs = joined.get(x.name, x.out_features) // (1 if row else ranks)
        if inputs % 128 or outputs % 64:
            names.append(f"{x.name} [{outputs}, {inputs}]")
    if names:
        yield (
            f"{common.listed(names)}: sglang's Marlin kernel takes layers whose outputs are a multiple of 64 and "
            "inputs of 128 on every rank: name these in modules_to_not_convert, or use fewer ranks"
        )


def _conditions(inventory: Inventory) -> Iterator[str]:
    yield from common.bfloat16_scales(inventory)
    if fused.expert_blocks(inventory):
        yield "its loading of experts was neither run nor read"


RULES = Rules(_problems, _conditions, partial(common.missing_keys, client="sglang"), tensor_parallel=True)
