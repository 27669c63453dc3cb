"""Replaces modules in a tree, QuantLinear for Linear or back: `swap_modules`, `swapped`."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping

from torch import nn

from gptq_plugin.device.modules import modules_of
from gptq_plugin.layers.hooks import share_hooks
from gptq_plugin.layers.qlinear import QuantLinear


def swap_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Replaces modules everywhere they occur in the tree, so that shared modules stay shared.

    A QuantLinear and the layer it replaces, or gives way to, have the same hooks (`hooks.share_hooks`).

    Args:
        model: The root, which cannot be replaced itself.
        replacements: Full dotted name -> replacement. One of a shared module's names is enough; others must agree.

    Raises:
        ValueError: A name is empty, not in the model, or gives a shared module a second replacement; nothing has been
            replaced then.
    """
    modules = modules_of(model, once=False)
    new: dict[nn.Module, nn.Module] = {}
    for name, module in replacements.items():
        if name not in modules or not name:
            near = difflib.get_close_matches(name, modules)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"the model has no submodule {name!r} to replace{hint}")
        if new.setdefault(modules[name], module) is not module:
            raise ValueError(
                f"{name!r} is a shared module with a different replacement under another name: give one for both"
            )
    for old, module in new.items():
        if isinstance(old, QuantLinear) or isinstance(module, QuantLinear):
            share_hooks(old, module)
    for parent in list(modules.values()):
        is_plain = type(parent).__setattr__ is nn.Module.__setattr__  # which takes longer to find that out
        for child_name, child in list(parent._modules.items()):
            if child in new and is_plain:
                parent._modules[child_name] = new[child]
            elif child in new:
                setattr(parent, child_name, new[child])
        if isinstance(parent, nn.TransformerEncoderLayer):
            _choose_fused_path(parent)


@contextlib.contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replaces modules inside the block, as `swap_modules` does, and puts back those that were there."""
    before = {name: model.get_submodule(name) for name in replacements}
    swap_modules(model, replacements)
    try:
        yield
    finally:
        swap_modules(model, before)


def _choose_fused_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keeps a layer with QuantLinear off PyTorch's fused path, which reads the linears' weights: 0 disables it, 1
    (relu) and 2 (gelu) are the constructor's values."""
    if any(isinstance(child, QuantLinear) for child in layer.children()):
        layer.activation_relu_or_gelu = 0
    elif layer.activation is nn.functional.relu or isinstance(layer.activation, nn.ReLU):
        layer.activation_relu_or_gelu = 1
    elif layer.activation is nn.functional.gelu or isinstance(layer.activation, nn.GELU):
        layer.activation_relu_or_gelu = 2
