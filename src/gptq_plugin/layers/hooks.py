"""Hooks that users registered on a layer, on the layer that takes its place too: `share_hooks`."""

from __future__ import annotations

from torch import nn

# What nn.Module.__call__ runs around forward; hooks of state dicts know the tensors of the layer they are on.
_CALL_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the forward and backward hooks of `old`, in their order.

    Both hold the same dictionaries from then on: a handle's `remove()`, and hooks registered later, reach both.
    """
    for name in _CALL_HOOKS:
        setattr(new, name, getattr(old, name))


def has_state_hooks(module: nn.Module) -> bool:
    """Return whether hooks of state dicts are registered on the module, which know its own tensors."""
    return any(getattr(module, name) for name in _STATE_HOOKS)
