"""The divergence from the float model's most likely tokens, against its definition."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.finish import top_logits
from gptq_plugin.finish.top_logits import Divergence, TopLogits


def logits(rows=7, classes=50, seed=0, spread=3.0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def by_definition(theirs, ours, k):
    """KL of the two distributions over the k most likely tokens of the first, and the rest as one."""
    p, q = theirs.softmax(-1), ours.softmax(-1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(k).indices, True)
    total = (p * (p / q).log())[kept].sum()
    rest_p, rest_q = (p * ~kept).sum(-1), (q * ~kept).sum(-1)
    if k < p.shape[1]:
        total = total + (rest_p * (rest_p / rest_q).log()).sum()
    return total


@pytest.mark.parametrize("k", [1, 10, 49, 50, 128])
@pytest.mark.parametrize("piece", [50, 150, 2**24])
def test_value_and_gradient_are_those_of_the_definition(k, piece, monkeypatch):
    monkeypatch.setattr(top_logits, "_PIECE", piece)
    theirs, ours = logits(), logits(seed=1).requires_grad_()
    top = TopLogits.of(theirs.float(), k)
    wanted = by_definition(theirs, ours, min(k, 50))
    (gradient,) = torch.autograd.grad(wanted, ours)
    student = ours.detach().float().requires_grad_()
    found = Divergence.apply(student, top)
    found.backward()
    assert top.ids.shape == (7, min(k, 50)) and len(top) == 7
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert top.divergence(student.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(student.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_with_all_tokens_it_is_torchs_divergence_and_with_fewer_it_is_less():
    theirs, ours = logits(seed=2).float(), logits(seed=3).float()
    whole = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True
    ).item()
    values = [TopLogits.of(theirs, k).divergence(ours) for k in (2, 8, 32, 50)]
    assert values == sorted(values) and values[0] < whole
    assert values[-1] == pytest.approx(whole, rel=1e-5)


def test_tokens_that_the_float_model_excludes_count_for_nothing():
    theirs, ours = logits(seed=4).float(), logits(seed=5).float()
    theirs[:, 10:] = -torch.inf
    ours.requires_grad_()
    for k in (4, 10, 20):
        top = TopLogits.of(theirs, k)
        (gradient,) = torch.autograd.grad(Divergence.apply(ours, top), ours)
        assert torch.isfinite(gradient).all() and top.divergence(ours.detach()) > 0
        same = torch.where(theirs > -torch.inf, theirs, -1e4)
        assert top.divergence(same) == pytest.approx(0, abs=1e-5)


def test_the_same_logits_have_no_divergence_and_no_gradient():
    ours = logits(seed=6).float().requires_grad_()
    value = Divergence.apply(ours, TopLogits.of(ours.detach(), 5))
    (gradient,) = torch.autograd.grad(value, ours)
    assert abs(value.item()) < 1e-5 and gradient.abs().max() < 1e-6


def test_no_positions_are_no_divergence():
    none = torch.empty(0, 50)
    assert TopLogits.of(none, 8).divergence(none) == 0
