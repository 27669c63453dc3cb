"""The modules of a tree, against PyTorch's own walk of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.device.modules import module_at, modules_of


class Tree(nn.Module):
    """Shared, missing and nested modules, in an order that names alone do not tell."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(2, 2)
        self.last = nn.Sequential(nn.Sequential(nn.ReLU(), shared), nn.ModuleList([shared, nn.Linear(2, 1)]))
        self.none = None
        self.register_module("missing", None)
        self.first = nn.ModuleDict({"a.b".replace(".", "_"): shared, "c": nn.Module()})
        self.again = self.last[1]


@pytest.mark.parametrize(
    "root", [Tree(), nn.Linear(1, 1), nn.Sequential(), torch.jit.script(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))]
)
@pytest.mark.parametrize("once", [True, False])
def test_they_have_the_names_and_the_order_that_pytorch_gives(root, once):
    found, wanted = modules_of(root, once=once), dict(root.named_modules(remove_duplicate=once))
    assert list(found) == list(wanted)
    assert all(found[name] is module for name, module in wanted.items())


def test_a_module_is_found_by_its_name_below_another():
    tree = Tree()
    assert all(module_at(tree, name) is module for name, module in tree.named_modules(remove_duplicate=False) if name)
    with pytest.raises(KeyError):
        module_at(tree, "last.5")
