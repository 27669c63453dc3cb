"""Buffers that no checkpoint holds, such as rotary frequencies: each reload makes them anew. `other_buffers`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gptq_plugin.errors import some


def other_buffers(model: nn.Module, again: nn.Module, share: float) -> list[str]:
    """A sentence if buffers outside the state dict differ from those that loading the export makes.

    Casting a whole model (``model.to(torch.bfloat16)``, ``precision="bf16-true"``) rounds them; clients compute with
    those of a reload.

    Args:
        model: In memory.
        again: Its export, loaded.
        share: How far its outputs are from the model's, as `verify_outputs.difference`.
    """
    made = dict(again.named_buffers())
    rounded, others = [], []
    for name, own in _unsaved(model):
        there = made.get(name)
        if there is None or there.shape != own.shape:  # such as a table that grew with the input
            continue
        if there.dtype != own.dtype:
            rounded.append(f"{name} ({_short(own)} here, {_short(there)} there)")
        elif not torch.equal(there.cpu(), own.cpu()):
            others.append(f"{name} (other values)")
    if not (rounded or others):
        return []
    remedy = ""
    if rounded:
        remedy = (
            ". Casting a whole module, as Lightning's precision='bf16-true' does, casts them too: load the model in "
            "its dtype instead, from_pretrained(..., dtype=torch.bfloat16) at precision='32-true', or cast its "
            "parameters alone, and the model computes in training what clients compute"
        )
    return [
        f"non-persistent buffers differ from what a reload makes: {some([*rounded, *others])}. Clients compute with "
        f"those of a reload, and an output of the sample differs by {share:.2g} of the largest{remedy}"
    ]


def _unsaved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating-point buffers that are not in the state dict, by name."""
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_floating_point():
                yield f"{prefix}.{name}" if prefix else name, buffer


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
