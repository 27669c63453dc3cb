"""Weights that make up for the drift of their inputs, against the plain definition; and their solution."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_steps

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq import asymmetric
from gptq_plugin.gptq.asymmetric import asymmetric_target
from gptq_plugin.gptq.factor import factorize
from gptq_plugin.gptq.losses import output_error
from gptq_plugin.gptq.solver import solve, solve_blocks

from kernel_cases import needs_gpu
from plain_gptq import ORDERS, correlated, plain


def problem(rows=6, n=64):
    """A weight, the Hessian of drifted inputs, their drift, and both inputs."""
    weight, hessian = correlated(rows=rows, n=n)
    g = torch.Generator().manual_seed(5)
    seen = torch.randn(4 * n, n, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(hessian).T
    x = seen + 0.2 * seen.roll(1, 1) + 0.05 * torch.randn(4 * n, n, generator=g, dtype=torch.float64)
    return weight, seen.T @ seen / len(x), (x - seen).T @ seen / len(x), x, seen


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_target_is_the_plain_one_for_every_block(alpha, order):
    weight, hessian, drift, _, _ = problem()
    hessian[[5, 40]] = 0  # dead inputs
    hessian[:, [5, 40]] = 0
    drift[:, [5, 40]] = 0
    config = plain(group_size=32, **ORDERS[order])
    factor, _ = factorize(hessian[None], config, torch.float64, 0.1)
    damping = torch.empty(64, dtype=torch.float64).index_copy_(0, factor.order[0], factor.damping[0])
    blocks = torch.stack([weight, 2 * weight - 1])
    found = asymmetric_target(blocks, drift, factor, alpha)
    for one, block in zip(found, blocks, strict=True):
        torch.testing.assert_close(one, plain_steps.asymmetric_target(block, hessian, drift, damping, alpha))
    torch.testing.assert_close(asymmetric_target(blocks, blocks @ drift, factor, alpha), found)


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("order", ORDERS)
def test_with_operands_of_float16_parts_the_correction_is_as_accurate_as_in_float32(order, size, device, monkeypatch):
    weight, hessian, drift, _, _ = problem(n=160)
    weight[2] *= 1e4
    hessian, drift = hessian * size, drift * size
    config = plain(group_size=32, **ORDERS[order])
    factor, _ = factorize(hessian[None].float().to(device), config, torch.float32, 0.1)
    damping = torch.empty(160).index_copy_(0, factor.order[0].cpu(), factor.damping[0].cpu())
    wanted = plain_steps.asymmetric_target(weight, hessian, drift, damping, 0.5) - weight
    monkeypatch.setattr(asymmetric, "_SPAN", 48)
    monkeypatch.setattr(asymmetric, "_INVERTED", 12)
    monkeypatch.setattr(asymmetric.tensor_cores, "_DEPTH", 64)
    otherwise = torch.randn(drift.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    given = {
        "of inputs": drift,
        "of outputs": (weight @ drift)[None],
        "summed in another order": drift * (1 + 1e-6 * otherwise),
    }
    found = {}
    for usable in (False, True):
        monkeypatch.setattr(asymmetric.tensor_cores, "usable", lambda x, usable=usable: usable)
        block = weight.float().to(device)[None]
        for name, one in given.items():
            target = asymmetric_target(block, one.float().to(device), factor, 0.5)[0].cpu().double()
            found[name, usable] = target - weight
            off = (target - weight - wanted).norm(dim=1) / wanted.norm(dim=1)
            assert bool((off < 1e-4).all()), (name, usable)
    assert not torch.equal(found["of inputs", True], found["of inputs", False])
    moved = (found["summed in another order", True] - found["of inputs", True]).norm(dim=1) / wanted.norm(dim=1)
    assert bool((moved < 1e-5).all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["gptq", "best"])
def test_outputs_are_nearer_to_the_float_models_and_the_loss_is_that_of_the_weight(method, order):
    weight, hessian, drift, x, seen = problem()
    fields = {"bits": 4, "group_size": 16, "method": method, "damp_percent": 0.01, **ORDERS[order]}
    away = {}
    for alpha in (0.0, 0.5, 1.0):
        solution = solve(weight, hessian, QuantizeConfig(**fields, asymmetric_alpha=alpha), drift)
        rounded = solution.weight.dequantize(torch.float64)
        away[alpha] = float((x @ weight.T - seen @ rounded.T).square().mean())
        torch.testing.assert_close(solution.loss, output_error(weight - rounded, hessian))
    assert away[1.0] < 0.7 * away[0.5] < 0.5 * away[0.0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["gptq", "best"])
def test_without_alpha_or_drift_the_weights_themselves_are_rounded_to_the_bit(method, order):
    weight, hessian, drift, _, _ = (t.float() for t in problem())
    fields = {"bits": 3, "group_size": 16, "method": method, **ORDERS[order]}
    usual = solve(weight, hessian, QuantizeConfig(**fields, asymmetric_alpha=0.0))
    for alpha, given in ((0.0, drift), (0.5, None), (0.5, torch.zeros_like(drift))):
        solution = solve(weight, hessian, QuantizeConfig(**fields, asymmetric_alpha=alpha), given)
        assert torch.equal(solution.weight.codes, usual.weight.codes)
        assert torch.equal(solution.weight.scales, usual.weight.scales)
        torch.testing.assert_close(solution.loss, usual.loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [6, 300])  # one block on a CPU, or two
def test_the_drift_of_outputs_gives_what_that_of_inputs_does(rows):
    weight, hessian, drift, _, _ = problem(rows=rows, n=320)
    config = plain(bits=3, group_size=32, asymmetric_alpha=0.5)
    for in_blocks in (True, False):
        wanted = solve(weight, hessian, config, drift, in_blocks=in_blocks)
        found = solve(weight, hessian, config, weight @ drift, in_blocks=in_blocks)
        assert torch.equal(found.weight.codes, wanted.weight.codes)
        torch.testing.assert_close(found.loss, wanted.loss)


@pytest.mark.parametrize("which", ["hessian", "drift"])
def test_a_drift_that_is_not_finite_is_refused(which):
    weight, hessian, drift, _, _ = problem()
    (hessian if which == "hessian" else drift)[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve(weight, hessian, plain(group_size=32, asymmetric_alpha=0.5), drift)


def test_a_factor_that_needs_more_damping_gets_the_target_with_that_damping():
    weight, hessian, drift, _, _ = problem()
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    config = plain(group_size=32, damp_percent=0.001, damp_auto_increment=0.01, asymmetric_alpha=0.5)
    solution = solve(weight, hessian, config, drift)
    assert solution.damp_percent == 0.101
    again = solve(weight, hessian, plain(group_size=32, damp_percent=0.101, asymmetric_alpha=0.5), drift)
    assert torch.equal(solution.weight.codes, again.weight.codes)


def test_a_blocks_target_does_not_depend_on_the_blocks_beside_it():
    weight, hessian, drift, _, _ = (t.float() for t in problem(rows=8))
    config = QuantizeConfig(bits=3, group_size=32, method="best")
    blocks = weight.view(2, 4, 64)
    both = solve_blocks(blocks, hessian, config, drift)
    for number in (0, 1):
        one = solve_blocks(blocks[number : number + 1], hessian, config, drift)
        assert torch.equal(one.weight.codes, both.weight.codes[4 * number : 4 * number + 4])
