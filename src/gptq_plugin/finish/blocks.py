"""The blocks of a model, and forwards that keep only their inputs for the backward: `blocks_of`, `checkpointed`.

Tested by tests/finish/test_finish_model.py: with activations that are computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gptq_plugin.finish.frozen_codes import FrozenCodes
from gptq_plugin.layers.qlinear import QuantLinear


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Runs blocks so that only their inputs are kept for the backward, inside the block."""
    wrapped: list[tuple[nn.Module, Any]] = []
    try:
        for _, block in blocks_of(model):
            wrapped.append((block, vars(block).get("forward")))
            block.forward = _rerun(block.forward)
        yield
    finally:
        for block, own in wrapped:
            if own is None:
                del block.forward
            else:
                block.forward = own


def _rerun(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def blocks_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The members of lists that hold quantized layers, the outermost, with their names."""
    for name, child in model.named_children():
        members = list(child.named_children()) if isinstance(child, nn.ModuleList) else []
        if any(_holds(member) for _, member in members):
            yield from ((f"{prefix}{name}.{number}", member) for number, member in members)
        else:
            yield from blocks_of(child, f"{prefix}{name}.")


def _holds(module: nn.Module) -> bool:
    return any(isinstance(part, (FrozenCodes, QuantLinear)) for part in module.modules())
