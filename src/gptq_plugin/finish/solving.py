"""The codes of a block solved anew, on what it reads behind the trained blocks before it: `solve_again`.

Tested by tests/finish/test_solving.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.finish.block_training import Task
from gptq_plugin.finish.descent import mean_over_ranks
from gptq_plugin.finish.frozen_codes import FrozenCodes
from gptq_plugin.finish.surroundings import Solver
from gptq_plugin.gptq.grid import QuantizedWeight
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.swap import swap_modules, swapped
from gptq_plugin.memory.resident import resident_on
from gptq_plugin.model.experts import block_of_experts
from gptq_plugin.walk.drift import Drift
from gptq_plugin.walk.groups import Group, find_groups
from gptq_plugin.walk.hessian import Hessian
from gptq_plugin.walk.layer_inputs import watch_inputs


@torch.no_grad()
def solve_again(
    name: str,
    block: nn.Module,
    weights: Mapping[str, Tensor],
    tasks: Sequence[Task],
    held_out: Mapping[int, Task],
    solver: Solver,
    device: torch.device,
) -> dict[str, QuantLinear]:
    """Solves the layers of a block in the order of their calls, each behind those before it, by inputs that went
    through the trained blocks and by the float block's. In a process group every rank calls it, with its own tasks.

    No quantized layer is called meanwhile: on a GPU it would take copies of its tensors there into a layout of its own.

    GPTQ solved them behind blocks that were not trained yet, and on calibration's samples, which may be fewer.

    Args:
        name: The block's, in the model.
        block: With its quantized layers; as it was afterwards.
        weights: The float weights, [out, in], by the names of layers in the block.
        tasks: To solve by.
        held_out: To judge by, by their numbers over all ranks.
        solver: Solves a layer.
        device: Where to compute.

    Returns:
        New layers on the device, by their names in the block. None if the held-out samples are not nearer to the float
        block's outputs with them. Layers of experts are none of them, nor those that are called more often than once.
    """
    quantized = {one: layer for one, layer in block.named_modules() if isinstance(layer, QuantLinear)}
    names = [one for one in quantized if one in weights and block_of_experts(f"{name}.{one}") is None]
    floats = {one: _float_layer(quantized[one], weights[one], device) for one in names}
    solved: dict[str, QuantLinear] = {}
    stand_ins = {one: FrozenCodes(layer, device) for one, layer in quantized.items()}
    with swapped(block, stand_ins), resident_on(block, device):
        before = _error(block, held_out, device)
        for group in _groups(block, names, tasks, device):
            found = _evidence(block, group, floats, tasks, device)
            if found is None:
                continue
            for one in group.names:
                weight = solver(f"{name}.{one}", quantized[one], floats[one].weight, *found)
                if weight is not None:
                    solved[one] = _layer(weight, quantized[one], device)
            swap_modules(block, {one: FrozenCodes(solved[one], device) for one in group.names if one in solved})
        after = _error(block, held_out, device)
    return solved if math.isfinite(after) and not after >= before else {}


def _groups(block: nn.Module, names: Sequence[str], tasks: Sequence[Task], device: torch.device) -> list[Group]:
    """The groups of layers that are called once, as a rank with a batch finds them. Collective."""
    layers = {name: block.get_submodule(name) for name in names}
    own = find_groups(layers, lambda: tasks[0].output(block, device)) if tasks else None
    known = [groups for groups in distributed.gather_objects(own) if groups is not None]
    return [group for group in known[0] if group.calls == 1] if known else []


def _evidence(
    block: nn.Module, group: Group, floats: Mapping[str, nn.Linear], tasks: Sequence[Task], device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The Hessian of a group's input and its drift, means over tokens, [in, in]; None if no token is known. Collective.

    Args:
        block: With the layers before the group as they are solved.
        floats: The float layers.
    """
    first = group.names[0]
    layer, width = block.get_submodule(first), floats[first].in_features
    exact = device.type != "cuda" or distributed.active()
    hessian, drift = Hessian(width, device, exact=exact), Drift(width, device, exact=exact)
    for task in tasks:
        with swapped(block, floats):
            x = _input(floats[first], partial(task.run, block, task.before, device))
        seen = _input(layer, partial(task.output, block, device))
        if x is None or seen is None or x.shape != seen.shape:
            continue
        rows, ours = x.flatten(0, -2), seen.flatten(0, -2)
        if task.counted is not None and len(task.counted) == len(rows):
            counted = task.counted.to(device)
            rows, ours = rows[counted], ours[counted]
        hessian.add(ours)
        drift.add(rows.to(ours.dtype), ours)
    hessian.over_ranks()
    drift.over_ranks()
    mean = hessian.mean()
    if not hessian.tokens or not bool(torch.isfinite(mean.diagonal()).all()):
        return None
    return mean, drift.mean(hessian.tokens)


def _input(layer: nn.Module, run: Callable[[], object]) -> Tensor | None:
    """What a layer reads in a forward that calls it once; else None."""
    found: list[Tensor] = []
    with watch_inputs({"": layer}, lambda _, x: found.append(x.detach().clone())):
        run()
    return found[0] if len(found) == 1 else None


def _float_layer(layer: QuantLinear, weight: Tensor, device: torch.device) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    made.weight = nn.Parameter(weight.to(device, layer.dtype), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
    return made


def _layer(weight: QuantizedWeight, before: QuantLinear, device: torch.device) -> QuantLinear:
    bias = None if before.bias is None else before.bias.detach().to(device)
    return QuantLinear.from_quantized(weight, bias, before.dtype)


def _error(block: nn.Module, held_out: Mapping[int, Task], device: torch.device) -> float:
    """The mean over positions of the squared error on all ranks' held-out tasks. Collective."""
    return mean_over_ranks(
        {number: (float(task.squares(task.output(block, device))), task.positions) for number, task in held_out.items()}
    )
