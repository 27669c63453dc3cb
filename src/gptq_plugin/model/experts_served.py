"""Experts of a loaded model for few tokens, in few launches: `serve_few`.

A model that generates waits for the host. transformers' forward in grouped products takes some twenty launches beside
the products; here two take their place. Many tokens, gradients and experts with biases go through transformers' own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.model.expert_weights import ExpertWeights

IMPLEMENTATION = "gptq_plugin"  # its name among transformers' implementations of experts
_OTHERS = "grouped_mm"  # transformers' own


def register() -> None:
    """Tells transformers, if it is imported, of the implementation, as whoever chooses it has to."""
    if "transformers" in sys.modules:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of transformers' modules with experts, whose arguments these are.

    Args:
        module: Has experts' parameters, or stand-ins for them.
        hidden_states: [tokens, in].
        top_k_index: The experts of each token, [tokens, experts of one].
        top_k_weights: Likewise.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    y = serve_few(module, hidden_states, top_k_index, top_k_weights)
    if y is None:
        result: Tensor = ALL_EXPERTS_FUNCTIONS[_OTHERS](module, hidden_states, top_k_index, top_k_weights)
        return result
    return y


def serve_few(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor | None:
    """The output for few tokens; None for others, and where the module does more than its two products and a gate.

    Args:
        module, x, chosen, weights: As for `forward`.
    """
    if not _on_gpu(x) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    from gptq_plugin.kernels.product import routing  # imported here: needs Triton

    values = module.__dict__
    up, down = values.get("gate_up_proj"), values.get("down_proj")
    if not (isinstance(up, ExpertWeights) and isinstance(down, ExpertWeights) and module.has_gate):
        return None
    if module.has_bias or values.get("has_post_expert_norm") or values.get("_is_expert_parallel"):
        return None
    if not 0 < chosen.numel() <= routing.MOST_PAIRS or weights.shape != chosen.shape:
        return None
    found = routing.sort_pairs(chosen.contiguous(), len(up))
    used_as = "in, out" if module.is_transposed else "out, in"
    y = up.grouped_product(x.index_select(0, found.tokens), found.ends, used_as)
    y = down.grouped_product(module._apply_gate(y), found.ends, used_as)
    return routing.combine(y.contiguous(), found.places, weights.contiguous()).to(x.dtype)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda
