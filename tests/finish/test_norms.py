"""Norms are found by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin.finish.norms import find_norms

from models import tiny_gpt2, tiny_llama


class OwnNorm(nn.Module):
    """As Gemma writes it: the weight is what is added to 1."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight


class NormByName(Scale):
    """Its name is all it has of one."""


class Table(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return torch.zeros_like(x) + self.weight  # a constant changes with no input


class Gated(OwnNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


def test_norms_of_every_kind_are_found_and_nothing_else():
    width = 16
    model = nn.ModuleDict(
        {
            "layer": nn.LayerNorm(width),
            "plain": nn.LayerNorm(width, elementwise_affine=False),
            "own": OwnNorm(width),
            "rms": nn.RMSNorm(width, eps=1e-6),
            "batch": nn.BatchNorm1d(width).eval(),
            "scale": Scale(width),
            "named": NormByName(width),
            "table": Table(width),
            "gated": Gated(width),
            "linear": nn.Linear(width, width),
            "prelu": nn.PReLU(width),
        }
    )
    assert list(find_norms(model)) == ["layer.weight", "layer.bias", "own.weight", "rms.weight"]


@pytest.mark.parametrize(("make", "count"), [(tiny_llama, 5), (tiny_gpt2, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_those_of_models(make, count, dtype):
    model = make().to(dtype)
    found = find_norms(model)
    assert len(found) == count and all("norm" in name or "ln_" in name for name in found)
    assert all(model.get_parameter(name) is parameter for name, parameter in found.items())


def test_a_norm_in_two_places_is_found_once_and_hooks_on_it_are_not_called():
    norm = OwnNorm(8)
    norm.register_forward_hook(lambda *_: pytest.fail("a user's hook"))
    state = torch.get_rng_state()
    assert list(find_norms(nn.ModuleList([norm, norm]))) == ["0.weight"]
    assert torch.equal(state, torch.get_rng_state())
