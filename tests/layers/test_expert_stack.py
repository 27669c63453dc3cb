"""The layers of all experts in one product: what it serves, and what calls them one by one.

Without a GPU a stand-in multiplies.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from random_weights import random_weight
from torch import nn

from gptq_plugin.layers.expert_stack import ExpertStack
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.experts_call import ExpertsCall

from gpu_products import stand_in
from kernel_cases import gpu

WIDTHS, IN, EXPERTS = (64, 128), 128, 4


class Experts(nn.Module):
    """Modules "0", "1", ... with two layers each, called at once."""

    def __init__(self, widths=WIDTHS, **shape):
        super().__init__()
        for expert in range(EXPERTS):
            own = nn.ModuleDict()
            for number, width in enumerate(widths):
                weight = random_weight(n_in=IN, n_out=width, **{"group_size": 64} | shape)
                own[f"layer{number}"] = QuantLinear.from_quantized(weight)
            self.add_module(str(expert), own)
        names = [[f"{expert}.layer{number}" for number in range(len(widths))] for expert in range(EXPERTS)]
        self.__dict__["call"] = ExpertsCall(self.layers, EXPERTS, (self, names))

    def layers(self, expert):
        return list(self.get_submodule(str(expert)).values())

    def __deepcopy__(self, memo):
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made


@pytest.fixture
def products(monkeypatch):
    torch.manual_seed(0)
    return stand_in(monkeypatch)


def arranged(**shape):
    experts = Experts(**shape)
    for layer in experts.modules():
        if isinstance(layer, QuantLinear):
            layer.arrange()
    return experts


def rows(counts=(2, 0, 3, 1), beyond=2):
    return torch.randn(sum(counts) + beyond, IN), torch.tensor(counts).cumsum(0, dtype=torch.int32)


def one_by_one(experts, x, ends):
    y, start = torch.zeros(len(x), sum(WIDTHS)), 0
    for expert, stop in enumerate(ends.tolist()):
        y[start:stop] = torch.cat([layer(x[start:stop]) for layer in experts.layers(expert)], -1)
        start = stop
    return y


@pytest.fixture
def stacked(products):
    experts = arranged()
    assert experts.call.stack()
    return experts


@pytest.mark.parametrize(
    "shape", [{}, {"bits": 3, "group_size": 32}, {"bits": 8}, {"bits": 2, "group_size": -1}], ids=str
)
@pytest.mark.parametrize("counts", [(2, 0, 3, 1), (0, 0, 0, 1), (0, 0, 0, 0)])
@torch.no_grad()
def test_one_product_serves_all_experts(shape, counts, products):
    experts = arranged(**shape)
    x, ends = rows(counts)
    wanted = one_by_one(experts, x, ends)
    assert experts.call.stack()
    products.clear()
    torch.testing.assert_close(experts.call(x, ends), wanted, rtol=1e-5, atol=1e-4)
    assert products == [EXPERTS * sum(WIDTHS)]


@torch.no_grad()
def test_a_layer_that_is_called_by_itself_computes_by_itself(stacked, products):
    x, ends = rows()
    one_by_one(stacked, x, ends)
    assert set(products) == set()  # not by products of several


def test_state_dicts_have_the_bytes_they_had(products):
    experts = arranged()
    before = {name: one.clone() for name, one in experts.state_dict().items()}
    assert experts.call.stack()
    after = experts.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("change", ["gradients", "hook", "bias", "other layer", "many rows", "restored"])
def test_otherwise_the_layers_are_called(change, stacked, products):
    x, ends = rows((70, 80, 90, 60)) if change == "many rows" else rows()
    seen = []
    if change == "hook":
        stacked.layers(1)[0].register_forward_hook(lambda *_: seen.append(1))
        ends = torch.tensor([2, 4, 6, 6], dtype=torch.int32)
    if change in ("bias", "other layer"):
        with torch.no_grad():
            stacked.call(x, ends)
    if change == "bias":
        stacked.layers(3)[0].bias = torch.ones(WIDTHS[0], dtype=torch.float16)
    if change == "other layer":
        other = QuantLinear.from_quantized(random_weight(n_in=IN, n_out=WIDTHS[0], group_size=64))
        stacked.get_submodule("2")["layer0"] = other
    if change == "restored":
        _ = stacked.layers(2)[1].qweight
    with torch.set_grad_enabled(change == "gradients"):
        wanted = one_by_one(stacked, x, ends)
        products.clear()
        seen.clear()
        y = stacked.call(x, ends)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4)
    if change == "restored":  # by the call one by one all are in the kernels' layout again
        assert products in ([EXPERTS * sum(WIDTHS)], [])
    else:
        assert products == []
    assert bool(seen) == (change == "hook")


@torch.no_grad()
def test_values_that_are_loaded_anew_count(stacked, products):
    x, ends = rows()
    other = arranged()
    wanted = one_by_one(other, x, ends)
    stacked.load_state_dict(other.state_dict())
    for _ in range(3):  # standard layout, kernels' layout, stacked
        torch.testing.assert_close(stacked.call(x, ends), wanted, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_copy_has_a_stack_of_its_own(stacked, products):
    class Whole(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.experts = experts

    x, ends = rows()
    wanted = one_by_one(stacked, x, ends)
    other = copy.deepcopy(Whole(stacked)).experts
    torch.testing.assert_close(other.call(x, ends), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("standard", "some are not in the layout of the kernels"),
        ("float", "some are not quantized"),
        ("bits", "8 bits, not 4"),
        ("bias", "they have biases"),
        ("width", "no multiples of 64"),
    ],
)
def test_the_log_tells_why_experts_are_not_stacked(change, reason, products, caplog):
    experts = Experts() if change == "standard" else arranged(**({"widths": (60,)} if change == "width" else {}))
    own = experts.get_submodule("1")
    if change == "float":
        own["layer0"] = nn.Linear(IN, WIDTHS[0], bias=False)
    if change in ("bits", "bias"):
        weight = random_weight(n_in=IN, n_out=WIDTHS[0], group_size=64, bits=8 if change == "bits" else 4)
        own["layer0"] = QuantLinear.from_quantized(weight, torch.zeros(WIDTHS[0]) if change == "bias" else None)
        own["layer0"].arrange()
    with caplog.at_level(logging.INFO):
        assert not experts.call.stack()
    assert reason in caplog.text


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_on_a_gpu_one_product_serves_all_experts(dtype):
    torch.manual_seed(0)
    experts = Experts().cuda()
    for layer in experts.modules():
        if isinstance(layer, QuantLinear):
            layer.arrange()
    for counts in ((2, 0, 3, 1), (0, 0, 0, 1), (40, 1, 0, 30), (300, 0, 1, 99)):
        x, ends = rows(counts)
        x, ends = x.to("cuda", dtype), ends.cuda()
        wanted = experts.call(x, ends)
        assert experts.call.stack() and isinstance(experts.layers(0)[0].siblings, ExpertStack)
        torch.testing.assert_close(experts.call(x, ends), wanted, rtol=2e-2, atol=2e-2)
