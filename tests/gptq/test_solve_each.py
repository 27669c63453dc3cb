"""Matrices with a Hessian each, solved together, against the solver that takes one at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.gptq import sweep
from gptq_plugin.gptq.solve_each import bytes_of_one, most, solve_each
from gptq_plugin.gptq.solver import solve

CONFIGS = {
    "static act-order": {},
    "the original act-order": {"desc_act": True, "static_groups": False},
    "natural order": {"static_groups": False},
    "one group": {"group_size": -1},
    "asymmetric, 3 bits": {"bits": 3, "sym": False},
    "plain": {"clip_ratios": (1.0,)},
    "best": {"method": "best", "asymmetric_alpha": 0.0},
    "best, 2 bits, asymmetric": {"method": "best", "asymmetric_alpha": 0.0, "bits": 2, "sym": False},
    "best, the original act-order": {
        "method": "best",
        "asymmetric_alpha": 0.0,
        "desc_act": True,
        "static_groups": False,
    },
    "many alternatives": {"clip_candidates": 5},
}
DRIFTING = {
    "best": {"method": "best"},
    "best, the original act-order": {"method": "best", "desc_act": True, "static_groups": False},
    "plain, asymmetric targets": {"asymmetric_alpha": 1.0},
}


def problems(experts, rows, columns, dtype):
    generator = torch.Generator().manual_seed(columns + rows)
    weights = torch.randn(experts, rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(experts, 3 * columns, columns, generator=generator, dtype=torch.float64)
    x *= torch.rand(experts, 1, columns, generator=generator, dtype=torch.float64) + 0.1
    x[1, :, 3] = 0  # an input that is always zero
    return weights.to(dtype), (x.mT @ x / x.shape[1]).to(dtype)


def drifts_of(hessians):
    """Inputs of the float model are nearly those of the quantized one, turned a little."""
    drifts = 0.1 * hessians.roll(1, 1) - 0.02 * hessians
    drifts[2] = 0
    return drifts


@pytest.mark.parametrize("config", [*CONFIGS, *(f"drift: {one}" for one in DRIFTING)])
@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (7, 96)])
def test_each_is_solved_as_if_it_were_alone(config, rows, columns):
    weights, hessians = problems(3, rows, columns, torch.float64)
    drifts = drifts_of(hessians) if config.startswith("drift") else None
    config = QuantizeConfig(**{"group_size": 32, **(CONFIGS | DRIFTING)[config.removeprefix("drift: ")]})
    damp_percents = torch.tensor([0.01, 0.05, 0.3], dtype=torch.float64)
    found = solve_each(weights, hessians, config, damp_percents, drifts)
    assert found.good.all()
    for number, damp_percent in enumerate(damp_percents.tolist()):
        own = dataclasses.replace(config, damp_percent=damp_percent)
        drift = None if drifts is None else drifts[number]
        wanted = solve(weights[number], hessians[number], own, drift, in_blocks=False)
        assert torch.equal(found.codes[number].T, wanted.weight.codes)
        assert torch.equal(found.scales[number], wanted.weight.scales)
        assert torch.equal(found.zeros[number], wanted.weight.zeros)
        assert torch.equal(found.g_idx[number], wanted.weight.g_idx)
        for loss, of_one in zip(found.losses[number], (wanted.loss, wanted.rtn_loss, wanted.output_power), strict=True):
            torch.testing.assert_close(loss, of_one)


def test_those_that_have_no_solution_are_told_and_do_not_disturb_the_others():
    weights, hessians = problems(5, 8, 32, torch.float32)
    config, damping = QuantizeConfig(group_size=32), torch.full((5,), 0.01)
    wanted = solve_each(weights, hessians, config, damping)
    hessians[0] = 0  # no token
    hessians[2] -= 50 * torch.eye(32)  # not positive definite
    hessians[3, 1, 1] = torch.nan
    weights[4] *= 1e9  # scales beyond float16
    found = solve_each(weights, hessians, config, damping)
    assert found.good.tolist() == [False, True, False, False, False]
    assert torch.equal(found.codes[1], wanted.codes[1])


@pytest.mark.parametrize("config", DRIFTING)
def test_with_operands_of_16_bits_each_is_solved_as_if_it_were_alone(config, monkeypatch):
    weights, hessians = problems(3, 24, 96, torch.float32)
    drifts = drifts_of(hessians)
    monkeypatch.setattr(sweep.tensor_cores, "usable", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(sweep, "SPAN", 32)
    config = QuantizeConfig(**{"group_size": 32, "bits": 3, **DRIFTING[config]})
    found = solve_each(weights, hessians, config, torch.full((3,), config.damp_percent), drifts)
    alone = [solve(*one, config, one_drift, in_blocks=False) for *one, one_drift in zip(weights, hessians, drifts)]
    same = torch.stack([one.weight.codes == found.codes[number].T for number, one in enumerate(alone)])
    assert found.good.all() and same.double().mean() > 0.99
    torch.testing.assert_close(found.losses[:, 0], torch.stack([one.loss for one in alone]), rtol=0.05, atol=0)


def test_a_drift_that_is_not_finite_is_told_and_does_not_disturb_the_others():
    weights, hessians = problems(3, 8, 32, torch.float32)
    config, damping, drifts = QuantizeConfig(group_size=32, method="best"), torch.full((3,), 0.1), drifts_of(hessians)
    wanted = solve_each(weights, hessians, config, damping, drifts)
    drifts[1, 2, 3] = torch.nan
    found = solve_each(weights, hessians, config, damping, drifts)
    assert found.good.tolist() == [True, False, True]
    assert torch.equal(found.codes[0], wanted.codes[0]) and torch.equal(found.codes[2], wanted.codes[2])
    without = solve_each(weights, hessians, config, damping)
    assert not torch.equal(found.codes[0], without.codes[0]) and torch.equal(found.codes[2], without.codes[2])


def test_the_number_that_is_solved_together_follows_from_the_shape_and_is_never_none():
    config = QuantizeConfig()
    assert most(1536, 2048, config) > 8
    assert most(1536, 2048, config) < most(2048, 768, config)
    assert most(10**6, 10**5, config) == 1
    many = QuantizeConfig(method="best", clip_candidates=12)
    assert most(1536, 2048, many) < most(1536, 2048, config)
    best = QuantizeConfig(method="best")
    assert most(1536, 2048, best) < most(1536, 2048, dataclasses.replace(best, asymmetric_alpha=0.0))
    drifting, few_rows = QuantizeConfig(asymmetric_alpha=0.5), (16, 4096)  # of which Hessians and drifts take most
    assert most(*few_rows, best) < most(*few_rows, drifting) < most(*few_rows, config)


def test_up_to_eight_wide_matrices_take_a_sixth_of_a_devices_memory():
    config, shape = QuantizeConfig(), (4096, 14336)  # Mixtral's
    each = bytes_of_one(*shape, config)
    found = [most(*shape, config, int(6 * number * each)) for number in (0, 1, 1.99, 2, 3.99, 4, 7.99, 8, 100)]
    assert found == [1, 1, 1, 2, 2, 4, 4, 8, 8]
    for others in ((1536, 2048), (28672, 4096)):  # of which many fit in a chunk, and one that is not so wide
        assert most(*others, config, 2**40) == most(*others, config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [*CONFIGS, *(f"drift: {one}" for one in DRIFTING)])
def test_on_a_gpu_codes_are_those_of_one_at_a_time(config):
    weights, hessians = (one.cuda() for one in problems(6, 200, 768, torch.float32))
    drifts = drifts_of(hessians) if config.startswith("drift") else None
    config = QuantizeConfig(**{"group_size": 128, **(CONFIGS | DRIFTING)[config.removeprefix("drift: ")]})
    found = solve_each(weights, hessians, config, torch.full((6,), config.damp_percent, device="cuda"), drifts)
    assert found.good.all()
    each = zip(weights, hessians, [None] * 6 if drifts is None else drifts, strict=True)
    alone = [solve(weight, hessian, config, drift, in_blocks=False) for weight, hessian, drift in each]
    same = torch.stack([one.weight.codes == found.codes[n].T for n, one in enumerate(alone)])
    assert same.double().mean() >= 0.999
    loss = torch.stack([one.loss for one in alone]).sum()
    assert abs(found.losses[:, 0].sum() / loss - 1) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("columns", [1536, 5120])
def test_on_a_gpu_wide_ones_together_have_the_codes_of_one_at_a_time(columns):
    """Each alone and several are factored in panels of different widths."""
    generator = torch.Generator("cuda").manual_seed(columns)
    x = torch.randn(2, 2 * columns, columns, generator=generator, device="cuda")
    hessians = x.mT @ x / x.shape[1]
    weights = torch.randn(2, 96, columns, generator=generator, device="cuda")
    config, damping = QuantizeConfig(), torch.full((2,), 0.01, device="cuda")
    together = solve_each(weights, hessians, config, damping)
    alone = [solve_each(weights[n : n + 1], hessians[n : n + 1], config, damping[:1]) for n in range(2)]
    assert together.good.all() and all(one.good.all() for one in alone)
    assert (together.codes == torch.cat([one.codes for one in alone])).double().mean() >= 0.999
    loss, wanted = together.losses[:, 0].sum(), torch.cat([one.losses[:, 0] for one in alone]).sum()
    assert abs(loss / wanted - 1) < 1e-3


def test_the_bytes_of_one_are_those_that_were_measured():
    """On an H200, in MiB of each matrix: upper bounds that are no waste; see docs/benchmarks/gpu-memory.md."""
    default, drifting = QuantizeConfig(), QuantizeConfig(asymmetric_alpha=0.25)
    measured = {
        (28672, 4096): (2609, 4122), (1536, 2048): (96, 136), (2048, 768): (53.3, 59.9), (8192, 2048): (422.8, 582.8),
        (4096, 14336): (1992, 2877), (2048, 5120): (335.5, 507.5),
    }  # fmt: skip
    for shape, (of_default, of_drifting) in measured.items():
        assert of_default <= bytes_of_one(*shape, default) / 2**20 <= 1.41 * of_default, shape
        assert of_drifting <= bytes_of_one(*shape, drifting) / 2**20 <= 1.85 * of_drifting, shape
    one, many = QuantizeConfig(clip_ratios=(1.0,)), QuantizeConfig(clip_candidates=5)
    assert bytes_of_one(8192, 2048, one) < bytes_of_one(8192, 2048, default) < bytes_of_one(8192, 2048, many)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("rows", "columns", "number"), [(1536, 2048, 8), (2048, 768, 16), (8192, 1024, 4), (64, 4096, 4)]
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_ratios": (1.0,)}, {"clip_candidates": 5}, {"asymmetric_alpha": 0.5}, {"method": "best"},
     {"method": "best", "asymmetric_alpha": 0.0}, {"static_groups": False}],
    ids=str,
)  # fmt: skip
def test_solving_on_a_gpu_takes_no_more_than_is_planned(changes, rows, columns, number):
    config = QuantizeConfig(**changes)
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(rows, columns, generator=generator, device="cuda").bfloat16() for _ in range(number)]
    x = torch.randn(2 * columns, columns, generator=generator, device="cuda")
    hessians = (x.mT @ x / len(x)).expand(number, -1, -1).contiguous()
    drifts = hessians * 0.01 if config.asymmetric_alpha else None
    damping = torch.full((number,), config.damp_percent, device="cuda")
    for _ in range(2):  # the first one compiles kernels, and libraries take their memory
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stacked = torch.cat(weights).unflatten(0, (number, -1))
        found = solve_each(stacked, hessians, config, damping, drifts)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        assert found.good.all()
        del stacked, found
    planned = number * bytes_of_one(rows, columns, config)
    print(
        f"{changes} {number} of {rows}x{columns}: {peak / 2**20:.0f} MiB of {planned / 2**20:.0f}, {peak / planned:.2f}"
    )
    assert peak <= planned
