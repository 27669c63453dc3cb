"""The modules of a tree, found without PyTorch's recursion: `modules_of`."""

from __future__ import annotations

from torch import nn


def modules_of(root: nn.Module) -> dict[str, nn.Module]:
    """A module and all its descendants by name, each once, as `nn.Module.named_modules` yields them.

    That goes through a generator for each level of the tree, for every module. A model of experts that are apart has
    tens of thousands of modules, and they are looked at many times.
    """
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    left: list[tuple[str, nn.Module]] = [("", root)]
    while left:
        name, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        found[name] = module
        if module._modules:
            prefix = f"{name}." if name else ""
            inner = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
            left += reversed(inner)
    return found
