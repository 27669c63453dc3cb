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


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the forward and backward hooks of `old`, in their order.

    Both hold the same dictionaries from then on: a handle's `remove()`, and hooks registered later, reach both.
    """
    vars(new).update({name: getattr(old, name) for name in _CALL_HOOKS})


def saves_its_own(module: nn.Module) -> bool:
    """Return whether a module's state dict holds its own tensors, as they are, under their names.

    Hooks of state dicts may save something else. Those of FSDP do not.
    """
    if not (module._state_dict_hooks or module._state_dict_pre_hooks):
        return True
    own = {name: value for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}
    saved = module.state_dict(keep_vars=True)
    return set(module._parameters) & own.keys() <= saved.keys() and all(
        value is own.get(name) for name, value in saved.items()
    )
