"""streamed_to: modules that are called by their parts run on another device, and have their own tensors afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeConfig
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.structure import Structure
from gptq_plugin.model.targets import find_targets

from module_tensors import held_tensors, rounded

CPU = torch.device("cpu")
CONFIG = QuantizeConfig(bits=2, group_size=32)


class Around(nn.Module):
    """Like a LightningModule around its model: never called itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
        self.head = nn.Linear(64, 3)
        self.factor = nn.Parameter(torch.full((3,), 2.0))
        self.shifts = nn.ParameterList([nn.Parameter(torch.ones(3))])

    def step(self, x):
        return self.head(self.model(x)) * self.factor + self.shifts[0]


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_module_that_is_never_called_runs_elsewhere_with_all_it_holds(device):
    around, device = Around(), torch.device(device)
    if device.type == "cuda":  # on the meta device quantized layers cannot compute
        targets, _ = find_targets(Structure.of(around.model), CONFIG)
        swap_modules(around.model, {target.name: rounded(target) for target in targets})
    x = torch.randn(5, 64)
    before, expected = held_tensors(around), around.step(x)
    with streamed_to(around, device):
        outputs = around.step(x.to(device))
    assert outputs.device.type == device.type and held_tensors(around) == before
    if device.type == "cuda":
        torch.testing.assert_close(outputs.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_what_is_brought_besides_a_part_leaves_it_alone():
    around = Around()
    with streamed_to(around, torch.device("meta"), besides=around.model):
        assert around.factor.is_meta and around.shifts[0].is_meta
        assert around.head(torch.ones(64, device="meta")).is_meta
        assert around.model(torch.ones(64)).device == CPU
    with streamed_to(around, torch.device("meta"), besides=around):
        assert around.factor.is_meta and not around.head.weight.is_meta
