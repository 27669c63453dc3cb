"""Experts that are called at once, in few launches: `forward`.

transformers' forward in grouped products takes some twenty launches beside the products, for which a model that
generates waits, and ten passes over the rows of all experts, which take longer than the products in calibration. Here
a sort, a gather and a sum by weights take their place. Gradients, experts with biases and what is no GPU's go through
transformers' own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.kernels import row_passes

IMPLEMENTATION = "gptq_plugin"  # its name among transformers' implementations of experts
_OTHERS = "grouped_mm"  # transformers' own


def register() -> None:
    """Tells transformers, if it is imported, of the implementation, as whoever chooses it has to.

    `torch.compile` leaves it as it is: it would trace the layers of all experts one by one.
    """
    if "transformers" in sys.modules:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, torch.compiler.disable(forward))


def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of transformers' modules with experts, whose arguments these are.

    Args:
        module: Has experts' parameters, or stand-ins for them.
        hidden_states: [tokens, in].
        top_k_index: The experts of each token, [tokens, experts of one].
        top_k_weights: Likewise.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    y = _served(module, hidden_states, top_k_index, top_k_weights)
    if y is None:
        result: Tensor = ALL_EXPERTS_FUNCTIONS[_OTHERS](module, hidden_states, top_k_index, top_k_weights)
        return result
    return y


def _served(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor | None:
    """The output; None where the module does more than its two products and a gate, or that has a gradient."""
    if not _on_gpu(x) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    from gptq_plugin.kernels.product import routing  # imported here: needs Triton

    values = module.__dict__
    up, down = values.get("gate_up_proj"), values.get("down_proj")
    if not all(hasattr(one, "grouped_product") for one in (up, down)) or not module.has_gate:  # `ExpertWeights`
        return None
    if module.has_bias or values.get("has_post_expert_norm") or values.get("_is_expert_parallel"):
        return None
    if not chosen.numel() or weights.shape != chosen.shape:
        return None
    few = chosen.numel() <= routing.MOST_PAIRS
    found = (routing.sort_pairs if few else routing.sort_many)(chosen.contiguous(), len(up))
    used_as = "in, out" if module.is_transposed else "out, in"
    y = up.grouped_product(x[found.tokens], found.ends, used_as)
    y = _gated(module, y)  # a batch may wait in the next product, and keeps no more than that takes
    y = down.grouped_product(y, found.ends, used_as)
    return routing.combine(y.contiguous(), found.places, weights.contiguous()).to(x.dtype)


def _gated(module: Any, both: Tensor) -> Tensor:
    """What the module makes of its gate's and up's values; silu(gate) · up in one pass, of the same bits."""
    return row_passes(both).silu_gated(both) if _is_silu(module) else module._apply_gate(both)


def _is_silu(module: Any) -> bool:
    """Whether that is transformers' own gate with SiLU, which nothing replaces or watches."""
    from transformers.activations import ACT2CLS
    from transformers.integrations import moe

    activation: Any = getattr(module, "act_fn", None)
    is_own = getattr(module._apply_gate, "__func__", None) is getattr(moe, "_default_apply_gate", module)
    if not is_own or type(activation) not in (nn.SiLU, ACT2CLS["silu"]):
        return False
    hooks = (*activation._forward_hooks.values(), *activation._forward_pre_hooks.values())
    return "forward" not in activation.__dict__ and all(map(_is_ours, hooks))


def _is_ours(hook: Any) -> bool:
    """Whether a hook is one of this package, of which those on activations bring weights."""
    return str(getattr(hook, "func", hook).__module__).startswith("gptq_plugin.")


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda
