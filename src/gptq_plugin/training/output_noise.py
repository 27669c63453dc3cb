"""Noise of quantized layers, by which they get more bits where their sensitivities are unknown: `output_noise`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed


@torch.no_grad()
def output_noise(
    model: nn.Module, floats: Mapping[str, nn.Module], batches: Sequence[Callable[[], Any]]
) -> dict[str, float]:
    """Measures the relative output error of quantized layers on their own inputs: Σ‖x(W − Q)ᵀ‖² / Σ‖xWᵀ‖².

    Every rank calls it, each with its own batches.

    Args:
        model: The quantized model.
        floats: The float layers that were replaced, by name.
        batches: Functions that each run a batch through the model.

    Returns:
        The error by layer, over all ranks; 0 for a layer that no batch reached.
    """
    wrong: dict[str, list[float]] = {name: [] for name in floats}  # by batch
    whole: dict[str, list[float]] = {name: [] for name in floats}

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            wanted = floats[name].forward(*args, **kwargs).float()  # without the hooks, which both layers have
            wrong[name].append(float((wanted - output.float()).square().sum()))
            whole[name].append(float(wanted.square().sum()))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(compare(name), with_kwargs=True, prepend=True)
        for name in floats
    ]
    try:
        for run in batches:
            run()
    finally:
        for handle in handles:
            handle.remove()
    ranks = distributed.gather_objects((wrong, whole))
    # Rounded once, so that the sum does not depend on the order of the batches, or on the ranks they are on.
    total = [{name: math.fsum(x for one in ranks for x in one[part][name]) for name in floats} for part in (0, 1)]
    return {name: total[0][name] / total[1][name] if total[1][name] else 0.0 for name in floats}
