"""Which experts are run, calibrated and solved at once, and the memory that takes: `grouped_experts`.

Tested by tests/quantize/test_experts_pass.py: by which experts are called at once.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from gptq_plugin import distributed
from gptq_plugin.device.memory import free_bytes
from gptq_plugin.gptq.solve_each import CHUNK_BYTES, bytes_of_one, most
from gptq_plugin.memory import placement
from gptq_plugin.memory.slots import distinct_tensors
from gptq_plugin.model.experts_at_once import Grouped, find_grouped
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.options import PassOptions

_NEIGHBOURS = 3  # blocks that are on the device while weights are streamed
_BYTES_HESSIAN = 8  # for every entry of a Hessian: half of it, in float64, and the mean, in float32
_BYTES_DRIFT = 8  # for every entry of a drift: its sum, in whose place its mean is, and a copy, in float32
_BYTES_EXACT_DRIFT = 12  # likewise: its sum, in float64, and its mean, in float32


def grouped_experts(plan: Plan, device: torch.device, options: PassOptions) -> dict[str, Grouped]:
    """The experts of a plan whose layers are all quantized, by name, if nothing is asked that needs them one by one.

    Gradients weight the tokens of each layer by themselves, and `cache_dir` and `resume` keep one stop of the walk
    after the other. If the device of any rank does not hold a block of experts and their evidence, all take one after
    the other. Collective.
    """
    targets = {target.name: target.module for target in plan.targets}
    if plan.config.token_weighting == "gradients" or options.keeps:
        return {}
    found = [
        one for one in find_grouped(plan.model) if all(name in targets for layers in one.layers for name in layers)
    ]
    free, streams = free_bytes(device, options.device_memory), plan.targets[0].parameter.device != device
    blocks = _NEIGHBOURS if streams or options.offload_weights else 1
    needed = whole_bytes(found) * blocks + evidence_bytes(found, plan, *_kind(device, options))
    fits = free is None or needed <= free // 4 * 3
    return {one.name: one for one in found} if found and distributed.minimum(fits) else {}


def whole_bytes(grouped: Collection[Grouped]) -> int:
    """Bytes of the largest module with experts."""
    modules = dict.fromkeys(one.module for one in grouped)
    return max((sum(one.nbytes for one in distinct_tensors(module)) for module in modules), default=0)


def solving_memory(device: torch.device, options: PassOptions) -> int:
    """Bytes of the device, by which `most` may choose how many experts are solved together; 0 where sums must not
    depend on it, or ranks solve some experts each."""
    if device.type != "cuda" or options.sums_exactly(device) or distributed.active():
        return 0
    total = int(torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.mem_get_info(device)[1])
    return total if options.device_memory is None else min(total, options.device_memory)


def solving_bytes(grouped: Collection[Grouped], plan: Plan, device: torch.device, options: PassOptions) -> int:
    """Bytes that layers, and experts called at once, take on the device beside their weights while they are solved."""
    return placement.solver_bytes(plan.targets) + evidence_bytes(grouped, plan, *_kind(device, options))


def _kind(device: torch.device, options: PassOptions) -> tuple[int, bool]:
    """The last arguments of `evidence_bytes`."""
    return solving_memory(device, options), options.sums_exactly(device)


def evidence_bytes(grouped: Collection[Grouped], plan: Plan, memory: int, exact: bool) -> int:
    """Bytes of the Hessians and drifts of all experts that are called at once, and of what solves them, where that is
    most.

    Args:
        grouped: The experts.
        plan: Their layers.
        memory: As for `most`.
        exact: As for `Hessian`.
    """
    drift = _BYTES_EXACT_DRIFT if exact else _BYTES_DRIFT
    of_entry = _BYTES_HESSIAN + drift * any(one.config.asymmetric_alpha for one in plan.targets)
    targets, found = {target.name: target for target in plan.targets}, [0]
    for one in grouped:
        own = [targets[name] for name in one.layers[0]]
        shape, config = (sum(target.shape[0] for target in own), one.in_features), own[0].config
        number = min(len(one.layers), most(*shape, config, memory))
        solving = max(CHUNK_BYTES, number * bytes_of_one(*shape, config))
        found.append(len(one.layers) * one.in_features**2 * of_entry + solving)
    return max(found)
