"""The definitions of the steps that improve rounded rows, by what they are to achieve."""

from __future__ import annotations

import pytest
import torch
from gptq_plugin.kernels import plain_steps, step_passes


def problem(n=24, bits=3, seed=0):
    """A row, its Hessian, codes on two groups, scales, zeros and the groups."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g, dtype=torch.float64)
    weight, group = torch.randn(n, generator=g, dtype=torch.float64), torch.arange(n) % 2
    scales, zeros = torch.tensor([0.5, 0.4], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    codes = (weight / scales[group] + zeros[group]).round().clamp(0, 2**bits - 1)
    return weight, x.T @ x / len(x), codes, scales, zeros, group


def loss(weight, hessian, codes, scales, zeros, group):
    e = weight - scales[group] * (codes - zeros[group])
    return e @ hessian @ e


def test_no_other_scales_have_less_loss_for_the_codes():
    weight, hessian, codes, _, zeros, group = problem()
    fitted = plain_steps.fitted_scales(weight, hessian, codes, zeros, group)
    least = loss(weight, hessian, codes, fitted, zeros, group)
    for change in ([1e-3, 0], [-1e-3, 0], [0, 1e-3], [0, -1e-3], [1e-3, -1e-3]):
        assert loss(weight, hessian, codes, fitted + torch.tensor(change), zeros, group) > least


def test_after_sweeps_of_descent_no_code_alone_can_lower_the_loss():
    weight, hessian, codes, scales, zeros, group = problem()
    order, none = torch.randperm(24, generator=torch.Generator().manual_seed(1)), torch.zeros(24)
    losses = [loss(weight, hessian, codes, scales, zeros, group)]
    for _ in range(20):
        codes = plain_steps.descended_codes(weight, hessian, codes, scales[group], zeros[group], order, none, 3)
        losses.append(loss(weight, hessian, codes, scales, zeros, group))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    for j in range(24):
        for step in (-1, 1):
            other = codes.clone()
            other[j] = (other[j] + step).clamp(0, 7)
            assert loss(weight, hessian, other, scales, zeros, group) >= losses[-1]


def test_the_whole_correction_gives_the_float_outputs_from_the_quantized_models_inputs():
    torch.manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64)
    seen = x + 0.3 * torch.randn(200, 12, dtype=torch.float64)
    weight = torch.randn(5, 12, dtype=torch.float64)
    hessian, drift = seen.T @ seen / 200, (x - seen).T @ seen / 200
    wanted = torch.linalg.lstsq(seen, x @ weight.T).solution.T
    found = plain_steps.asymmetric_target(weight, hessian, drift, torch.zeros(12), 1.0)
    torch.testing.assert_close(found, wanted)
    half = plain_steps.asymmetric_target(weight, hessian, drift, torch.zeros(12), 0.5)
    torch.testing.assert_close(half, (weight + wanted) / 2)
    assert torch.equal(plain_steps.asymmetric_target(weight, hessian, drift, torch.zeros(12), 0.0), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_of_a_grid_is_that_of_rounding_to_it(bits):
    torch.manual_seed(0)
    targets, gain = torch.randn(21, 5, dtype=torch.float64), torch.rand(21, dtype=torch.float64)
    scales, channel = torch.rand(4, 3, 5, dtype=torch.float64) + 0.1, torch.randperm(21)
    zeros = torch.randint(0, 2**bits, (4, 3, 5)).double()
    grids = scales[:, None], zeros[:, None]
    found = step_passes(targets).grid_errors(targets[None], channel[None], *grids, gain[None], bits)[:, 0]
    points = scales[..., None] * (torch.arange(2**bits) - zeros[..., None])  # [A, G, rows, codes]
    away = targets[channel].unflatten(0, (3, 7))[None, ..., None] - points[:, :, None]
    wanted = (away.square().amin(-1) * gain[channel].view(3, 7, 1)).sum(2)
    torch.testing.assert_close(found, wanted)


def test_equations_for_scales_give_the_loss_after_any_change_of_them():
    torch.manual_seed(0)
    rows, group, channel = 5, torch.tensor([1, 0, 2] * 4), torch.tensor([1, 4, 7, 10, 0, 3, 6, 9, 2, 5, 8, 11])
    weight, half = torch.randn(12, rows, dtype=torch.float64), torch.randn(12, 12, dtype=torch.float64)
    hessian, codes = half @ half.T, torch.randint(0, 8, (12, rows), dtype=torch.uint8)
    scales, zeros = torch.rand(3, rows, dtype=torch.float64), torch.randint(0, 8, (3, rows)).double()
    natural = torch.arange(12)

    def losses(scales):
        error = plain_steps.rounding_errors(*(of[None] for of in (weight, codes, scales, zeros, group, natural)))[0]
        torch.testing.assert_close(error, weight - scales[group] * (codes.double() - zeros[group]))
        return torch.einsum("ir,ij,jr->r", error, hessian, error)

    errors = plain_steps.rounding_errors(*(of[None] for of in (weight, codes, scales, zeros, group, channel)))[0]
    torch.testing.assert_close(errors, (weight - scales[group] * (codes.double() - zeros[group]))[channel])
    some, change = slice(1, 4), torch.randn(3, rows, dtype=torch.float64)
    grouped = plain_steps.grouped_hessian(hessian[channel][:, channel][None])
    of_all = plain_steps.scale_equations(grouped, codes[None], zeros[None], errors[None], channel[None], some)
    matrix, right = (one[0] for one in of_all)
    d = change[:, some].T
    found = losses(scales)[some] - 2 * (right * d).sum(1) + torch.einsum("rg,rgh,rh->r", d, matrix, d)
    torch.testing.assert_close(found, losses(scales + change)[some])
    fitted = scales[:, 1] + torch.linalg.solve(matrix[0], right[0])
    torch.testing.assert_close(
        fitted, plain_steps.fitted_scales(weight[:, 1], hessian, codes[:, 1], zeros[:, 1], group)
    )
