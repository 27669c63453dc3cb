"""Asks a client's rules about a checkpoint, before a quantization begins and in `gptq-plugin check`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gptq_plugin.clients.client import Client
from gptq_plugin.clients.common import listed
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.device.precision import FLOAT16
from gptq_plugin.errors import ExportError


def refuse(inventory: Inventory, target: Client | None) -> None:
    """Raises ExportError with every reason why `target` does not take the checkpoint; refuses nothing without one."""
    found = problems(inventory, target) if target is not None else []
    if found:
        raise ExportError(f"target: {target} would not take this checkpoint:\n  " + "\n  ".join(found))


def problems(inventory: Inventory, target: Client) -> list[str]:
    """Finds why a client refuses a checkpoint or computes something else with it, and what it takes instead.

    Returns:
        A sentence for each reason; empty when the client takes it.
    """
    if inventory.model_type is None:
        return [
            f"{target.client} loads transformers models, and this is a plain nn.Module: load it with "
            "gptq_plugin.load_quantized(directory, model=...)"
        ]
    return [*target.rules.problems(inventory, target.tensor_parallel_size), *_overflow(inventory)]


def conditions(inventory: Inventory, target: Client) -> list[str]:
    """Lists what a client that takes the checkpoint needs beside it, or does differently on a CPU."""
    return list(target.rules.conditions(inventory))


def _overflow(inventory: Inventory) -> Iterator[str]:
    """Every client computes in the float weights' dtype; in float16, larger values become infinite."""
    names = [name for name, largest in inventory.activations.items() if largest > FLOAT16]
    if names and inventory.dtype == torch.float16:
        largest = max(inventory.activations.values())
        yield (
            f"{listed(names, inventory)}: inputs or outputs reach {largest:.4g} in calibration, and float16, the "
            f"model's dtype, ends at {FLOAT16:.0f}: call model.to(torch.bfloat16) and quantize again"
        )
