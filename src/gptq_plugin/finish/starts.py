"""Where the training of codes begins: `begin_at_compensated`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.finish.block_training import Task
from gptq_plugin.finish.latent_codes import LatentCodes

_DAMPING = 0.1  # of the mean diagonal entry


@torch.no_grad()
def begin_at_compensated(
    block: nn.Module,
    layers: Mapping[str, LatentCodes],
    weights: Mapping[str, Tensor],
    tasks: Sequence[Task],
    device: torch.device,
) -> None:
    """Has the latents of a block begin at compensated weights, or as near to these as is rounded to GPTQ's codes.

    With weights q that the codes stand for and the Hessian H of a layer's inputs these are
    t_j = q_j + ((w - q) (H + Λ))_j / (H + Λ)_jj: what is best for a channel while all others have their codes, so that
    nearly all are rounded to these. Float weights w are not: GPTQ has rounded many to a code further away, to make up
    for others. In a process group every rank calls it, with its own tasks.

    Args:
        block: With the layers in it, on the device.
        layers: By name.
        weights: The float weights, [out, in], by the same names; a layer without one stays at its codes.
        tasks: What the block reads.
        device: Where the block is.
    """
    hessians = {
        name: torch.zeros(weight.shape[1], weight.shape[1], device=device)
        for name, weight in weights.items()
        if name in layers
    }
    with _adding({layers[name]: hessian for name, hessian in hessians.items()}) as counting:
        for task in tasks:
            counting(task.counted)
            task.output(block, device)
    for name, hessian in hessians.items():
        distributed.sum_(hessian)
        diagonal = hessian.diagonal()
        diagonal += _DAMPING * diagonal.mean()
        layer = layers[name]
        codes = layer.dequantize(torch.float32)
        apart = (weights[name].to(device, torch.float32) - codes) @ hessian
        layer.begin_at(apart.div_(diagonal).add_(codes))


@contextlib.contextmanager
def _adding(hessians: Mapping[nn.Module, Tensor]) -> Iterator[Any]:
    """Adds the Hessians of layers' inputs inside the block; yields what takes the positions that count from then on."""
    kept: list[Tensor | None] = [None]

    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = next(iter((*args, *kwargs.values())))  # called as nn.Linear may be: layer(input=x)
        rows = x.flatten(0, -2).float()
        if kept[0] is not None and len(kept[0]) == len(rows):
            rows = rows[kept[0].to(rows.device)]
        hessians[layer].addmm_(rows.t(), rows)

    def count(counted: Tensor | None) -> None:
        kept[0] = counted

    handles = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in hessians]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
