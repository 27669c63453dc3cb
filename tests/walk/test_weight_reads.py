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
def test_a_weight_that_the_model_reads_stays_float_and_is_reported(way):
    torch.manual_seed(0)
    model = Reading(way).eval()
    report = QuantizeModule(bits=4, group_size=32).quantize(model, [torch.randn(64, 32)])
    methods = {module.name: module.method for module in report.modules}
    assert methods == {"called": "gptq", "read": "float", "asked": "gptq"}
    assert "read: the model reads its weight by itself: left float" in list(report.all_deviations())
    assert isinstance(model.read, nn.Linear)


HOOKS = {
    "an input": lambda layer: layer.register_forward_pre_hook(lambda m, args: (args[0] * (m.weight.sum() * 0 + 1),)),
    "an output": lambda layer: layer.register_forward_hook(lambda m, args, y: y + args[0] @ m.weight.T * 0.1),
    "data, with keywords": lambda layer: layer.register_forward_hook(
        lambda m, args, kwargs, y: y + m.weight.data[0], with_kwargs=True
    ),
    "several": lambda layer: layer.register_forward_hook(lambda m, args, y: y + torch.cat([m.weight, m.weight])[0]),
    "nothing but a look": lambda layer: layer.register_forward_hook(
        lambda m, args, y: m.norms.append(float(m.weight.norm()))
    ),
}


@pytest.mark.parametrize("what", HOOKS)
def test_a_layer_whose_hook_reads_its_weight_stays_float_since_the_hook_goes_on(what):
    torch.manual_seed(0)
    model = Reading("in a layer's hook").eval()
    model.read.norms = []
    HOOKS[what](model.read)
    before, hooks = (
        model(x := torch.randn(64, 32)),
        [dict(model.read._forward_hooks), dict(model.read._forward_pre_hooks)],
    )
    report = QuantizeModule(bits=8, group_size=32).quantize(model, [x])
    assert {module.name: module.method for module in report.modules} == {
        "called": "gptq",
        "read": "float",
        "asked": "gptq",
    }
    assert "read: the model reads its weight by itself: left float" in list(report.all_deviations())
    assert (model(x) - before).norm() / before.norm() < 0.02
    assert [dict(model.read._forward_hooks), dict(model.read._forward_pre_hooks)] == hooks


@pytest.mark.parametrize(
    "read",
    [
        lambda x, layer: x @ layer.weight.T,
        lambda x, layer: functional.linear(x, layer.weight.data),
        lambda x, layer: x @ torch.cat([layer.weight, layer.weight])[:32],
        lambda x, layer: x @ layer.weight.data.T.contiguous(),
        lambda x, layer: x + torch.stack((layer.weight.detach(),)).sum(),
    ],
)
def test_a_weight_that_is_read_through_a_view_or_in_a_list_is_read(read):
    class Model(Reading):
        def forward(self, x):
            return read(self.read(self.called(x)), self.read)

    model = Model("").eval()
    report = QuantizeModule(bits=8, group_size=32).quantize(model, [torch.randn(64, 32)])
    assert {module.name: module.method for module in report.quantized} == {"called": "gptq"}


def test_a_hook_that_reads_nothing_or_only_a_dtype_leaves_the_layer_to_be_quantized():
    model = Reading("in a layer's hook").eval()
    model.read.register_forward_hook(lambda m, args, y: y.to(m.weight.dtype).view(-1, m.weight.shape[0]))
    model.read.register_forward_hook(lambda m, args, y: None if m.weight.data.device == y.device else 1 / 0)
    report = QuantizeModule(bits=8, group_size=32).quantize(model, [torch.randn(64, 32)])
    assert all(module.method == "gptq" for module in report.modules)


def test_a_quantized_layers_weight_is_a_placeholder_of_its_shape_and_dtype():
    model = nn.Sequential(nn.Linear(32, 64, bias=False)).to(torch.bfloat16)
    QuantizeModule(bits=4, group_size=32).quantize(model, [torch.randn(64, 32, dtype=torch.bfloat16)])
    layer = model[0]
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (64, 32) and layer.weight.isnan().all()
    assert layer.weight.untyped_storage().nbytes() == 2
    assert model.to(torch.float16)[0].weight.dtype == torch.float16 and "weight" not in layer.state_dict()
    with pytest.raises(RuntimeError, match="single memory location"):
        layer.weight.mul_(2)
