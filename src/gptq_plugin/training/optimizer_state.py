"""The optimizers' state around quantization, which needs the device's memory: `on_cpu`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@contextlib.contextmanager
def on_cpu(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Keeps the state of optimizers on the CPU inside the block; afterwards it is where it was, also after an error."""
    moved = [
        (state, key, _move(state, key))
        for optimizer in optimizers
        for state in optimizer.state.values()
        if isinstance(state, dict)
        for key in state
    ]
    try:
        yield
    finally:
        for state, key, devices in moved:
            if any(devices) and key in state:
                leaves, form = tree_flatten(state[key])
                state[key] = tree_unflatten(
                    [leaf if device is None else leaf.to(device) for leaf, device in zip(leaves, devices, strict=True)],
                    form,
                )


def _move(state: dict[Any, Any], key: Any) -> list[torch.device | None]:
    """Moves a value of the state; returns the device each of its tensors had, None for what stays."""
    leaves, form = tree_flatten(state[key])
    devices = [leaf.device if isinstance(leaf, Tensor) and leaf.device.type != "cpu" else None for leaf in leaves]
    if any(devices):
        state[key] = tree_unflatten(
            [leaf if device is None else leaf.cpu() for leaf, device in zip(leaves, devices, strict=True)], form
        )
    return devices
