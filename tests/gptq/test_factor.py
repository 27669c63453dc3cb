"""The factor of a damped Hessian: what it multiplies back to, in blocks and in one go."""

from __future__ import annotations

import pytest
import torch

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.precision import full_precision
from gptq_plugin.gptq import factor as factoring
from gptq_plugin.gptq.factor import attempts, factorize

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def hessians(batch, n, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3 * n, n, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, n)
    return (x.mT @ x / (3 * n)).to(dtype)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_multiplies_back_to_the_damped_hessian_in_visiting_order(act_order):
    h = hessians(2, 40)
    h[1, 7] = h[1, :, 7] = 0  # never an input
    factor, good = factorize(h, QuantizeConfig(static_groups=act_order), torch.float64, 0.02)
    assert good.tolist() == [True, True]
    for b in range(2):
        order = factor.order[b]
        diagonal = h[b].diagonal()
        assert sorted(order.tolist()) == list(range(40))
        assert torch.equal(order, torch.arange(39, -1, -1)) or act_order
        assert not act_order or torch.equal(diagonal[order], diagonal.sort().values)
        live = diagonal > 0
        added = torch.where(live, 0.02 * diagonal[live].mean(), diagonal[live].mean())
        torch.testing.assert_close(factor.damping[b], added[order])
        a = factor.rows[b].T  # unit lower triangular
        assert torch.equal(a.diagonal(), torch.ones(40, dtype=torch.float64)) and torch.equal(a, a.tril())
        product = a @ torch.diag(factor.gain[b]) @ a.T
        torch.testing.assert_close(product, h[b][order][:, order] + torch.diag(added[order]))


def test_the_hessians_are_not_changed_and_one_that_cannot_be_factored_is_told_from_the_others():
    h = hessians(3, 16)
    h[1, 0, 1] = h[1, 1, 0] = 1e6
    before = h.clone()
    _, good = factorize(h, QuantizeConfig(), torch.float64, 0.01)
    assert good.tolist() == [True, False, True]
    assert torch.equal(h, before)


@devices
@pytest.mark.parametrize(("n", "panel"), [(64, 16), (70, 16), (33, 32), (129, 32), (16, 16)])
def test_in_blocks_as_in_one_go(n, panel, device, monkeypatch):
    monkeypatch.setattr(factoring, "_INVERTED", 8)
    h = hessians(2, n, torch.float32).to(device)
    h /= h.amax()  # as `factorize` has it: a diagonal of at most 4
    wanted = torch.linalg.cholesky(h.double()).mT
    with full_precision(h.device):
        failed = factoring._blocked_cholesky(h, panel)
    assert failed.tolist() == [False, False]
    torch.testing.assert_close(h.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(h, h.triu())


@pytest.mark.parametrize("where", [0, 20, 47])
def test_in_blocks_too_an_indefinite_matrix_is_told(where):
    h = hessians(2, 48, torch.float32)
    h[1, where, where] = -1
    with full_precision(h.device):
        assert factoring._blocked_cholesky(h, 16).tolist() == [False, True]


def test_attempts_go_from_what_was_asked_over_float64_to_more_damping():
    config = QuantizeConfig(damp_percent=0.01, damp_auto_increment=0.02)
    asked, *others = attempts(torch.float32, config)
    assert asked == (torch.float32, 0.01) and others[0] == (torch.float64, 0.01)
    assert [round(damp, 6) for _, damp in others[1:]] == [0.03, 0.21]
    assert list(attempts(torch.float64, QuantizeConfig(damp_auto_increment=0))) == [(torch.float64, 0.01)]


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_the_size_of_a_hessian_does_not_matter(size):
    h = hessians(1, 48, torch.float32)
    plain, _ = factorize(h, QuantizeConfig(), torch.float32, 0.01)
    scaled, good = factorize(h * size, QuantizeConfig(), torch.float32, 0.01)
    assert good.all()
    torch.testing.assert_close(scaled.rows, plain.rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled.gain / size, plain.gain, rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_factor_too_large_for_split_products_is_told_on_a_gpu():
    h = torch.eye(32, device="cuda")[None].clone()
    h[0, 31, 31] = 1e12  # without damping an error there would be pushed on a million times as large
    h[0, 31, 0] = h[0, 0, 31] = 9e5
    assert not factorize(h, QuantizeConfig(), torch.float32, 0.0)[1].item()
    assert factorize(h.cpu(), QuantizeConfig(), torch.float32, 0.0)[1].item()
    assert factorize(h, QuantizeConfig(), torch.float32, 0.01)[1].item()


def test_a_hessian_is_factored_in_the_precision_that_is_asked_and_returned_in_its_own():
    h = hessians(2, 24, torch.float32)
    found, exact = (factorize(x, QuantizeConfig(), torch.float64, 0.0)[0] for x in (h, h.double()))
    for name in ("rows", "gain"):
        assert torch.equal(getattr(found, name), getattr(exact, name).float())
    assert not torch.equal(factorize(h, QuantizeConfig(), torch.float32, 0.01)[0].rows, found.rows)


def test_each_hessian_is_brought_near_one_before_it_is_factored(monkeypatch):
    """Split products, and float32's range, need that."""
    largest, cholesky = [], factoring._cholesky

    def watch(matrices):
        largest.extend(matrices.diagonal(dim1=1, dim2=2).amax(1).tolist())
        return cholesky(matrices)

    monkeypatch.setattr(factoring, "_cholesky", watch)
    h = hessians(6, 16, torch.float32) * torch.tensor([1e-30, 1e-9, 1.0, 2.0, 1e9, 1e30])[:, None, None]
    assert factorize(h, QuantizeConfig(), torch.float32, 0.0)[1].all()
    assert len(largest) == 6 and all(0.5 <= one < 2 for one in largest)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_told_from_the_others(value):
    h = hessians(3, 16)
    h[1, 4, 4] = value
    assert factorize(h, QuantizeConfig(), torch.float64, 0.01)[1].tolist() == [True, False, True]


def test_nothing_is_factored_on_another_device():
    h = hessians(2, 70, torch.float32)
    configs, found = (QuantizeConfig(static_groups=True), QuantizeConfig(static_groups=False)), []
    with torch.device("meta"):
        for config in configs:
            factor, good = factorize(h, config, torch.float32, 0.01)
            found.append((*vars(factor).values(), good))
        factoring._blocked_cholesky(blocked := h / h.amax(), 16)
    for config, (*tensors, good) in zip(configs, found, strict=True):
        wanted, _ = factorize(h, config, torch.float32, 0.01)
        assert good.all() and all(torch.equal(one, other) for one, other in zip(tensors, vars(wanted).values()))
    torch.testing.assert_close(blocked, torch.linalg.cholesky(h / h.amax()).mT, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "n", "panels"), [(1, 64, []), (1, 65, [16]), (2, 15, []), (2, 16, [8]), (2, 64, [8]), (2, 130, [8])]
)
def test_where_products_are_split_wide_matrices_and_several_are_factored_in_blocks(batch, n, panels, monkeypatch):
    h = hessians(batch, n, torch.float32)
    wanted, _ = factorize(h.double(), QuantizeConfig(), torch.float64, 0.01)
    in_blocks, seen = factoring._blocked_cholesky, []
    monkeypatch.setattr(factoring, "_blocked_cholesky", lambda m, panel: seen.append(panel) or in_blocks(m, panel))
    monkeypatch.setattr(factoring, "_PANEL", 16)
    monkeypatch.setattr(factoring, "WIDE", 64)
    monkeypatch.setattr(factoring, "_PANEL_OF_MANY", 8)
    monkeypatch.setattr(factoring, "_INVERTED", 8)
    for usable in (False, True):
        monkeypatch.setattr(factoring.tensor_cores, "usable", lambda x, usable=usable: usable)
        factor, good = factorize(h, QuantizeConfig(), torch.float32, 0.01)
        assert good.all() and seen == (panels if usable else [])
        torch.testing.assert_close(factor.rows.double(), wanted.rows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(factor.gain.double(), wanted.gain, rtol=1e-4, atol=0)


def test_a_panel_is_a_whole_number_of_the_triangles_that_are_inverted():
    assert factoring._PANEL % factoring._INVERTED == factoring._PANEL_OF_MANY % factoring._INVERTED == 0


def test_a_triangle_is_substituted_in_its_own_precision(monkeypatch):
    monkeypatch.setattr(factoring, "_INVERTED", 4)
    corner = torch.linalg.cholesky(hessians(2, 12)).mT.contiguous()
    side = hessians(2, 12)[:, :, :5].clone()
    wanted = torch.linalg.solve_triangular(corner.mT, side, upper=False)
    factoring._substitute(corner, side)
    torch.testing.assert_close(side, wanted, rtol=1e-11, atol=1e-12)


def test_blocks_keep_float32s_accuracy_where_entries_are_small(monkeypatch):
    monkeypatch.setattr(factoring, "_INVERTED", 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 64, generator=generator, dtype=torch.float64) * torch.logspace(0, -4.5, 64)
    h = x.mT @ x / 200
    wanted = torch.linalg.cholesky(h).mT.diagonal(dim1=1, dim2=2)
    with full_precision(h.device):
        factoring._blocked_cholesky(blocked := (h / 2).float(), 16)
    found = blocked.double().diagonal(dim1=1, dim2=2) * 2**0.5
    assert ((found - wanted).abs() / wanted).max() < 2e-6


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_where_products_are_split_a_factor_with_a_larger_entry_than_they_take_is_not_good(sign, monkeypatch):
    def with_entry(entry):
        """A Hessian in whose factor the error at one input is pushed to the other this much larger."""
        return torch.tensor([[entry**2 + 1, entry], [entry, 1.0]], dtype=torch.float64)

    largest = sign * factoring.tensor_cores.LARGEST
    h = torch.stack([with_entry(largest), with_entry(largest + sign), with_entry(1.0)])
    config = QuantizeConfig(static_groups=False)
    factor, good = factorize(h, config, torch.float64, 0.0)
    assert factor.rows[:, 0, 1].tolist() == [largest, largest + sign, 1.0] and good.all()
    monkeypatch.setattr(factoring.tensor_cores, "usable", lambda x: True)
    assert factorize(h, config, torch.float64, 0.0)[1].tolist() == [True, False, True]
    h[2, 0, 0] = -1.0  # small entries, and no factor
    assert factorize(h, config, torch.float64, 0.0)[1].tolist() == [True, False, False]


def test_damping_stays_below_the_mean_of_the_diagonal():
    config = QuantizeConfig(damp_percent=0.5, damp_auto_increment=0.5)
    assert list(attempts(torch.float64, config)) == [(torch.float64, 0.5)]
