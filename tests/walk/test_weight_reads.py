"""Layers whose weight the model reads by itself stay float, called or not."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function

from gptq_plugin import QuantizeModule


class Reading(nn.Module):
    """`read` is used in several ways, `called` and `asked` are only called."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.called, self.read, self.asked = (nn.Linear(32, 32) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x)
        if self.way == "not called":
            x = functional.linear(x, self.read.weight, self.read.bias)
        elif self.way == "called too":
            x = self.read(x) + functional.linear(x, self.read.weight)
        elif self.way == "a part of it":
            x = self.read(x) * self.read.weight[0]
        elif self.way == "by keyword":
            x = functional.linear(x, weight=self.read.weight, bias=None)
        elif self.way == "after an error":
            with contextlib.suppress(RuntimeError):
                self.read(x[:, :-1])
            x = x @ self.read.weight
        elif self.way == "by a module with parameters":
            x = x @ self.read.weight * self.scale
        elif self.way == "changed in place":
            self.read.weight.div_(1.0)
            x = self.read(x)
        elif self.way == "by a function without a name":
            x = handle_torch_function(functools.partial(torch.matmul), (x, self.read.weight), x, self.read.weight)
        elif self.way == "in a layer's hook":
            x = self.read(x)
        y: Tensor = self.asked(x.to(self.asked.weight.dtype)[:, : self.asked.weight.shape[1]])
        return y


@pytest.mark.parametrize(
    "way",
    [
        "not called",
        "called too",
        "a part of it",
        "changed in place",
        "by keyword",
        "after an error",
        "by a module with parameters",
        "by a function without a name",
    ],
)
def test_a_weight_that_the_model_reads_stays_float_and_that_is_said(way):
    torch.manual_seed(0)
    model = Reading(way).eval()
    report = QuantizeModule(bits=4, group_size=32).quantize(model, [torch.randn(64, 32)])
    methods = {module.name: module.method for module in report.modules}
    assert methods == {"called": "gptq", "read": "float", "asked": "gptq"}
    assert "read: the model reads its weight by itself: left float" in list(report.all_deviations())
    assert isinstance(model.read, nn.Linear)


def test_a_hook_on_the_layer_may_look_at_its_weight():
    model = Reading("in a layer's hook").eval()
    model.read.register_forward_pre_hook(lambda module, args: (args[0] * (module.weight.sum() * 0 + 1),))
    report = QuantizeModule(bits=4, group_size=32).quantize(model, [torch.randn(64, 32)])
    assert all(module.method == "gptq" for module in report.modules)


def test_what_a_quantized_layer_says_of_its_weight():
    model = nn.Sequential(nn.Linear(32, 64, bias=False)).to(torch.bfloat16)
    QuantizeModule(bits=4, group_size=32).quantize(model, [torch.randn(64, 32, dtype=torch.bfloat16)])
    layer = model[0]
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (64, 32) and layer.weight.isnan().all()
    assert layer.weight.untyped_storage().nbytes() == 2
    assert model.to(torch.float16)[0].weight.dtype == torch.float16 and "weight" not in layer.state_dict()
    with pytest.raises(RuntimeError, match="single memory location"):
        layer.weight.mul_(2)
