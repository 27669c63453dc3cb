"""A layer is linear by what it computes, whatever its class."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gptq_plugin.model.linears import is_linear, linear_shape


class Wordy(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class WithoutBias(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Needy(nn.Linear):
    """Cannot run without something that Linear does not have."""

    def forward(self, x, scale):
        return scale * super().forward(x)


class Dropped(nn.Linear):
    """Drops weights in training, as DropConnect does."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5, self.training), self.bias)


class FromConfig(nn.Linear):
    """Its constructor takes something else than Linear's."""

    def __init__(self, config):
        super().__init__(config["in"], config["out"])


@pytest.mark.parametrize(
    ("layer", "linear"),
    [
        (nn.Linear(4, 6), True),
        (Conv1D(6, 4), True),
        (Wordy(4, 6), True),
        (Wordy(4, 6, bias=False), True),
        (FromConfig({"in": 4, "out": 6}), True),
        (Dropped(4, 6), True),
        (WithoutBias(4, 6), False),
        (Needy(4, 6), False),
        (nn.Conv1d(4, 6, 1), False),
        (nn.Bilinear(4, 4, 6), False),
        (nn.Embedding(4, 6), False),
    ],
)
def test_a_module_is_linear_if_it_computes_what_linear_does(layer, linear):
    assert is_linear(layer) is linear


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), Conv1D(6, 4)])
def test_the_shape_is_outputs_by_inputs_in_either_layout(layer):
    assert linear_shape(layer) == (6, 4) == (layer(torch.zeros(4)).numel(), 4)


def test_looking_at_a_class_for_the_first_time_draws_no_random_numbers():
    class Unseen(nn.Linear):
        """Computes what Linear does, in a forward of its own."""

        def forward(self, x):
            return super().forward(x)

    layer, before = Unseen(4, 6), torch.get_rng_state()
    assert is_linear(layer)
    assert torch.equal(torch.get_rng_state(), before)
