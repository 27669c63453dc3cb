"""Stand-ins for a parameter of experts' matrices: they multiply as the parameter would, and refuse all else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from gptq_plugin.errors import TargetError
from gptq_plugin.model.expert_weights import ExpertWeights, WatchedWeights, as_linear

OUT, IN, EXPERTS = 6, 4, 3
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(0))


def experts(parts=1):
    """A module whose children are the experts, each of `parts` layers; the whole parameter [experts, out, in]; and its
    stand-in."""
    torch.manual_seed(0)
    module = nn.Module()
    for number in range(EXPERTS):
        expert = nn.Module()
        for part in range(parts):
            expert.add_module(f"w{part}", nn.Linear(IN, OUT // parts, bias=False))
        module.add_module(str(number), expert)
    names = [[f"{number}.w{part}" for part in range(parts)] for number in range(EXPERTS)]
    rows = [torch.cat([module.get_submodule(name).weight for name in of_one]) for of_one in names]
    whole = torch.stack(rows).detach()
    return whole, ExpertWeights(module, names, whole.shape, whole.dtype)


USES = {
    "linear": lambda w, x: functional.linear(x, w),
    "a bias": lambda w, x: functional.linear(x, w, torch.ones(OUT)),
    "no bias": lambda w, x: functional.linear(x, w, None),
    "transposed": lambda w, x: x @ w.T,
    "t": lambda w, x: torch.matmul(x, w.t()),
    "mT": lambda w, x: x.matmul(w.mT),
    "transpose": lambda w, x: torch.mm(x, w.transpose(0, 1)),
    "turned twice": lambda w, x: functional.linear(x, w.T.T.contiguous()),
    "cast": lambda w, x: functional.linear(x, w.to(x.dtype)),
    "on the left": lambda w, x: w @ x.T,
    "on the left, turned": lambda w, x: torch.matmul(w.T.mT, x.mT).T,
    "a vector": lambda w, x: w @ x[0],
    "columns of several": lambda w, x: torch.matmul(w, x.mT.expand(2, 3, -1, -1)),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_one_experts_entry_multiplies_as_its_matrix_would(use, parts):
    whole, weights = experts(parts)
    for number in (0, EXPERTS - 1, torch.tensor(1), torch.tensor([2])):
        wanted = USES[use](whole[int(number)], X)
        torch.testing.assert_close(USES[use](weights[number], X), wanted)
    assert [USES["linear"](one, X).shape for one in weights] == [(5, OUT)] * EXPERTS


def test_all_experts_multiply_at_once_in_a_batched_product():
    whole, weights = experts()
    x = torch.randn(EXPERTS, 5, IN)
    for product in (torch.bmm, torch.matmul, lambda a, b: a @ b):
        torch.testing.assert_close(product(x, weights), torch.bmm(x, whole.mT))


def test_it_answers_for_the_parameter():
    whole, weights = experts()
    assert (len(weights), weights.shape, weights.dtype, weights.dim()) == (EXPERTS, whole.shape, whole.dtype, 3)
    assert (weights.size(), weights.size(1), weights.device) == (whole.shape, OUT, whole.device)
    assert (weights[0].dtype, weights[0].device) == (whole.dtype, whole.device)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.add(w[0], 1),
        lambda w: w[0].sum(),
        lambda w: torch.einsum("eoi,ni->eno", w, X),
        lambda w: torch.relu(w[1]),
        lambda w: w[0:2],
        lambda w: w[torch.tensor([0, 1])],
        lambda w: w[0] * 2,
        lambda w: 2.0 - w[0],
        lambda w: -w[0],
        lambda w: w[0][:2],
        lambda w: w[0] > 0,
    ],
)
def test_any_other_use_is_refused_with_the_module_and_the_remedy(use):
    _, weights = experts()
    with pytest.raises(TargetError, match="Module uses its experts' weights in a way .*modules_to_not_convert"):
        use(weights)


@pytest.mark.parametrize(
    ("use", "layouts"),
    [
        (lambda w: functional.linear(X, w[0]), {"out, in"}),
        (lambda w: X @ w[0].T, {"out, in"}),
        (lambda w: functional.linear(X @ w[0].T, w[1].T), {"out, in", "in, out"}),
        (lambda w: torch.randn(2, OUT) @ w[0], {"in, out"}),
        (lambda w: torch.bmm(torch.randn(EXPERTS, 5, OUT), w), {"in, out"}),
        (lambda w: w[0] @ torch.ones(IN, 3), {"out, in"}),
        (lambda w: w[0].T @ torch.ones(OUT, 3), {"in, out"}),
        (lambda w: functional.linear(X, w[0] * 0.5), {None}),
        (lambda w: functional.linear(X, 0.5 * w[0]), {None}),
        (lambda w: functional.linear(X, -w[0] + 1 - w[1] / 2), {None}),
        (lambda w: functional.linear(X, torch.cat([w[0][:2], w[0][2:]])), {None}),
        (lambda w: w[0] @ w[1].T, {"out, in", None}),
        (lambda w: w[0].sum(), {None}),
        (lambda w: torch.relu(w), {None}),
        (lambda w: (w.shape, w.dtype, w.device, w.dim(), w.size(), len(w)), set()),
    ],
)
def test_a_watched_parameter_computes_what_it_would_and_tells_how_it_was_used(use, layouts):
    parameter = torch.randn(EXPERTS, OUT, IN)
    watched = WatchedWeights(parameter)
    torch.manual_seed(1)
    got = use(watched)
    torch.manual_seed(1)
    wanted = use(parameter)
    assert watched.uses == layouts
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(got, wanted)
    else:
        assert got == wanted


def test_a_layout_that_the_layers_were_not_made_from_is_refused():
    whole, weights = experts()
    for layout, right, wrong in (
        ("out, in", USES["linear"], lambda w, x: x @ w),
        ("in, out", lambda w, x: x @ w, USES["t"]),
    ):
        strict = ExpertWeights(weights._module, weights._parts, whole.shape, whole.dtype, layout)
        torch.testing.assert_close(right(strict[0], X), X @ whole[0].T)
        with pytest.raises(TargetError, match=r"\(as \[.*\], where \[.*\] is declared\).*modules_to_not_convert"):
            wrong(strict[0], X)


def test_a_matrix_is_brought_into_the_layout_of_linear():
    matrix = torch.randn(2, 3)
    assert torch.equal(as_linear(matrix, "out, in"), matrix) and torch.equal(as_linear(matrix, "in, out"), matrix.T)
