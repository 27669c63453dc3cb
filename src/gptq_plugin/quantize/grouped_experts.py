"""Which experts are run, calibrated and solved at once, and the memory that takes: `grouped_experts`.

Tested by tests/quantize/test_experts_pass.py: by which experts are called at once.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from gptq_plugin import distributed
from gptq_plugin.device.memory import free_bytes
from gptq_plugin.gptq.solve_each import CHUNK_BYTES
from gptq_plugin.memory.slots import distinct_tensors
from gptq_plugin.model.experts_at_once import Grouped, find_grouped
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.options import PassOptions

_NEIGHBOURS = 3  # blocks that are on the device while weights are streamed
_BYTES_HESSIAN = 8  # for every entry of a Hessian: half of it, in float64, and what is left of strips
_BYTES_DRIFT = 8  # for every entry of a drift, in float64


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
    fits = free is None or whole_bytes(found) * blocks + evidence_bytes(found, plan) <= free // 4 * 3
    return {one.name: one for one in found} if found and distributed.minimum(fits) else {}


def whole_bytes(grouped: Collection[Grouped]) -> int:
    """Bytes of the largest module with experts."""
    modules = dict.fromkeys(one.module for one in grouped)
    return max((sum(one.nbytes for one in distinct_tensors(module)) for module in modules), default=0)


def evidence_bytes(grouped: Collection[Grouped], plan: Plan) -> int:
    """Bytes of the Hessians and drifts of all experts that are called at once, where that is most, and of what solves
    them."""
    of_entry = _BYTES_HESSIAN + _BYTES_DRIFT * any(one.config.asymmetric_alpha for one in plan.targets)
    of_layers = (len(one.layers) * one.in_features**2 * of_entry for one in grouped)
    return max(of_layers, default=0) + (CHUNK_BYTES if grouped else 0)
