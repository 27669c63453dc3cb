"""The modules of a tree, against PyTorch's own walk of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.device.modules import modules_of


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
def test_they_have_the_names_and_the_order_that_pytorch_gives(root):
    found, wanted = modules_of(root), dict(root.named_modules())
    assert list(found) == list(wanted)
    assert all(found[name] is module for name, module in wanted.items())
