"""Matrices of experts are taken by how a forward uses them, not by what their module declares."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from gptq_plugin import QuantizeModule
from gptq_plugin.errors import TargetError

COUNT = 4
PRODUCTS = {
    "x Wᵀ": lambda w, i, x: functional.linear(x, w[i]),
    "x W": lambda w, i, x: x @ w[i],
    "Wᵀ xᵀ": lambda w, i, x: (w[i].T @ x.T).T,
    "W xᵀ": lambda w, i, x: torch.matmul(w[i], x.T).T,
    "W x, row by row": lambda w, i, x: torch.stack([w[i] @ row for row in x]),
}
OTHERWISE = {
    "a scaled matrix": lambda w, i, x: functional.linear(x, w[i] * 0.5),
    "a number before it": lambda w, i, x: functional.linear(x, 0.5 * w[i]),
    "a difference": lambda w, i, x: functional.linear(x, w[i] - w[0] / 2),
    "the negative": lambda w, i, x: functional.linear(x, -w[i]),
    "a part": lambda w, i, x: functional.linear(x, torch.cat([w[i][16:], w[i][:16]])),
    "einsum": lambda w, i, x: torch.einsum("no,io->ni", x, w[i]),
    "both ways": lambda w, i, x: functional.linear(x @ w[i], w[i]),
}


def model(use, declared):
    """A new class each time: what was learned holds for a class."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(COUNT, 32, 32) / 5)
            if declared is not None:
                self.is_transposed = declared

        def forward(self, x):
            return sum(use(self.w, i, x) for i in range(COUNT))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.experts, self.last = nn.Linear(32, 32), Experts(), nn.Linear(32, 32)

        def forward(self, x):
            return self.last(self.experts(torch.relu(self.first(x))))

    torch.manual_seed(0)
    return Net().eval()


def quantized(net, **options):
    x = torch.randn(64, 32)
    before = net(x)
    report = QuantizeModule(bits=8, group_size=32, **options).quantize(net, [x])
    return report, float((net(x) - before).norm() / before.norm())


@pytest.mark.parametrize("declared", [None, False, True])
@pytest.mark.parametrize("use", PRODUCTS)
def test_a_product_is_quantized_whatever_is_declared(use, declared):
    """A square matrix that was declared the other way gave 1.21 of the outputs' norm."""
    report, apart = quantized(model(PRODUCTS[use], declared))
    assert len(report.quantized) == 2 + COUNT and apart < 0.02


@pytest.mark.parametrize("declared", [None, False, True])
@pytest.mark.parametrize("use", OTHERWISE)
def test_any_other_use_leaves_the_matrices_float_with_the_reason(use, declared):
    report, apart = quantized(net := model(OTHERWISE[use], declared))
    assert [module.name for module in report.quantized] == ["first", "last"] and apart < 0.02
    assert isinstance(net.experts.w, nn.Parameter)
    reasons = {one.name: one.reason for one in report.coverage.floats}
    assert reasons["experts.w"] == "matrices of Experts, which are not used as one expert's each"


def test_a_forward_that_contradicts_what_was_learned_is_refused_with_the_remedy():
    turns = []

    def use(w, i, x):
        turns.append(i)  # in the forward that shows the use, another than afterwards
        return functional.linear(x, w[i]) if len(turns) <= COUNT else x @ w[i]

    net = model(use, None)
    with pytest.raises(TargetError, match=r"as \[in, out\], where \[out, in\] is declared.*modules_to_not_convert"):
        QuantizeModule(bits=8, group_size=32).quantize(net, [torch.randn(64, 32)])
    assert isinstance(net.experts.w, nn.Parameter)
