"""The steps behind the recursion, against their plain definitions, and what a whole solve makes of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gptq_plugin.kernels import plain_steps

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq import improve, refine
from gptq_plugin.gptq.factor import factorize
from gptq_plugin.gptq.losses import output_error
from gptq_plugin.gptq.recursion import Recursion
from gptq_plugin.gptq.row_blocks import divided
from gptq_plugin.gptq.solver import solve, solve_blocks

from plain_gptq import ORDERS, correlated, plain

GRIDS = {"symmetric": {"sym": True}, "v1 zeros": {"sym": False}, "v2": {"sym": False, "checkpoint_format": "gptq_v2"}}


def started(rows=6, n=96, **fields):
    """Rows of a problem in float64, solved by the recursion."""
    weight, hessian = correlated(rows=rows, n=n)
    config = QuantizeConfig(**{"bits": 3, "group_size": 32, **fields})
    factor, _ = factorize(hessian[None], config, torch.float64, config.damp_percent)
    start = Recursion(weight[None], factor, config)
    start.visit_in_units()
    return refine.Rows.of(start, hessian[None]), refine.Rounding.of(start), start.g_idx().long(), hessian


def alone(now):
    """A rounding of one matrix without the first dimension."""
    return refine.Rounding(*(getattr(now, name)[0] for name in refine.Rounding.__annotations__))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_scales_are_those_with_the_least_loss_for_the_codes(grid, order, monkeypatch):
    rows, now, group, hessian = started(**GRIDS[grid], **ORDERS[order])
    monkeypatch.setattr(refine, "stored_scales", lambda scales: scales)
    monkeypatch.setattr(refine, "_RIDGE", {torch.float64: 0.0})
    monkeypatch.setattr(refine, "_EQUATIONS", 9 * 4)  # some rows at a time
    found, now = alone(refine.refitted(rows, now)), alone(now)
    for row in range(6):
        wanted = plain_steps.fitted_scales(rows.weight[0, :, row], hessian, now.codes[:, row], now.zeros[:, row], group)
        near = (wanted > now.scales[:, row] / 2) & (wanted < now.scales[:, row] * 2)
        wanted = torch.where(near, wanted, now.scales[:, row])
        torch.testing.assert_close(found.scales[:, row], wanted, rtol=1e-9, atol=0)
    assert (found.loss < now.loss).sum() >= 5 and torch.equal(found.codes, now.codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("n", "span", "strip"), [(96, 512, 1024), (96, 32, 40), (160, 40, 33)])
def test_a_sweep_of_descent_sets_each_code_to_the_best_for_all_others(grid, order, n, span, strip, monkeypatch):
    rows, now, group, hessian = started(n=n, **GRIDS[grid], **ORDERS[order])
    monkeypatch.setattr(refine.sweep.__globals__["tensor_cores"], "usable", lambda x: False)
    monkeypatch.setitem(refine.sweep.__globals__, "SPAN", span)
    monkeypatch.setitem(refine.sweep.__globals__, "_STRIP", strip)
    found, now = alone(refine.descended(rows, now)), alone(now)
    damping = torch.empty(n, dtype=torch.float64)
    damping[rows.recursion.channel.long()] = rows.recursion.damping
    for row in range(6):
        codes = plain_steps.descended_codes(
            rows.weight[0, :, row], hessian, now.codes[:, row], now.scales[group, row], now.zeros[group, row],
            rows.recursion.channel.long().flip(0), damping, 3,
        )  # fmt: skip
        assert torch.equal(found.codes[:, row].double(), codes)
    assert not torch.equal(found.codes, now.codes)
    assert torch.equal(found.scales, now.scales) and torch.equal(found.zeros, now.zeros)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_round_picks_grids_that_suit_the_targets_and_solves_on_them(grid, order, monkeypatch):
    rows, now, group, hessian = started(**GRIDS[grid], **ORDERS[order])
    monkeypatch.setitem(refine.sweep.__globals__, "_STRIP", 40)
    whole, now = now, alone(now)
    errors = rows.weight[0] - now.scales[group] * (now.codes - now.zeros[group])
    visited = rows.recursion.channel.long().flip(0)
    lower = torch.linalg.cholesky(
        (hessian[visited][:, visited] + rows.recursion.damping.flip(0).diag()).flip(0, 1)
    ).flip(0, 1)
    targets = torch.empty_like(errors)
    targets[visited] = (rows.weight[0] - errors)[visited] + (lower / lower.diagonal()).T @ errors[visited]
    torch.testing.assert_close(refine._targets(rows, whole)[0], targets[rows.by_position[0]])
    gain = torch.empty(96, dtype=torch.float64)
    gain[visited] = lower.diagonal().square()

    def error(scales, zeros):  # [G, rows]
        q = (targets / scales[group] + zeros[group]).round().clamp(0, 7)
        off = (targets - scales[group] * (q - zeros[group])).square() * gain[:, None]
        return torch.zeros_like(scales).index_add_(0, group, off)

    scales, zeros = (of[0] for of in refine._picked_grids(rows, targets[rows.by_position[0]][None], whole))
    least = 1 if grid == "v1 zeros" else 0
    tried = [
        error(rows.storable(now.scales * factor, z := (now.zeros + move).clamp(least, 7))[0], z)
        for factor in refine._FACTORS
        for move in ((0,) if grid == "symmetric" else (-1, 0, 1))
    ]
    torch.testing.assert_close(error(scales, zeros), torch.stack(tried).amin(0))
    assert bool((scales != now.scales).any())
    found = alone(refine.regridded(rows, whole))
    picked = (found.scales == scales).all(0)
    half = (found.scales == rows.storable((scales * now.scales).sqrt(), now.zeros)[0]).all(0)
    assert bool((picked | half).all()) and bool(picked.any())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_loss_of_no_row_rises_through_any_step(bits, grid, order):
    rows, now, group, hessian = started(rows=16, bits=bits, method="best", **GRIDS[grid], **ORDERS[order])

    def exact(rounding):
        rounding = alone(rounding)
        error = rows.weight[0] - rounding.scales[group] * (rounding.codes - rounding.zeros[group])
        return output_error(error.T, hessian)

    first, steps = exact(now), [refine.regridded] * 2 + [refine.refitted, refine.descended] * 2
    for step in steps:
        after = refine.better(now, step(rows, now))
        assert bool((exact(after) <= exact(now)).all())
        torch.testing.assert_close(exact(after), after.loss[0], rtol=1e-9, atol=0)
        now = after
    assert exact(now).sum() < (0.995 if bits == 8 else 0.97) * first.sum()


def test_a_row_takes_what_is_better_for_it_alone():
    values = torch.arange(3.0)
    of_columns = [values.expand(2, size, 3) for size in (4, 2, 2)]
    one = refine.Rounding(*of_columns, torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]))
    other = refine.Rounding(*(-of - 9 for of in of_columns), torch.tensor([[1.0, 1.0, torch.nan], [1.0, 1.0, 2.0]]))
    both = refine.better(one, other)
    for name in ("codes", "scales", "zeros", "loss"):
        wanted = getattr(one, name).clone()
        wanted[0, ..., 1] = getattr(other, name)[0, ..., 1]
        assert torch.equal(getattr(both, name), wanted), name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_its_pieces_the_best_method_gives_gptqs_codes_to_the_bit(dtype, order):
    weight, hessian = (t.to(dtype) for t in correlated(rows=600, n=64))
    gptq = QuantizeConfig(bits=3, group_size=16, **ORDERS[order])
    of_gptq = {name: getattr(gptq, name) for name in ("damp_percent", "clip_ratios", "clip_candidates")}
    without = QuantizeConfig(
        bits=3, group_size=16, method="best", scale_rounds=0, refit_rounds=0, **of_gptq, **ORDERS[order]
    )
    for config in (gptq, dataclasses.replace(gptq, clip_ratios=(1.0,))):
        other = dataclasses.replace(without, clip_ratios=config.clip_ratios)
        one, two = solve(weight, hessian, config), solve(weight, hessian, other)
        for name in ("codes", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(one.weight, name), getattr(two.weight, name)), name
        assert torch.equal(one.loss, two.loss)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_best_method_has_less_loss_and_reports_it_for_the_scales_as_stored(bits, grid, order):
    weight, hessian = correlated(rows=16, n=192)
    fields = {"bits": bits, "group_size": 32, "damp_percent": 0.02, **GRIDS[grid], **ORDERS[order]}
    best = solve(weight, hessian, QuantizeConfig(method="best", **fields))
    error = weight - best.weight.dequantize(torch.float64)
    torch.testing.assert_close(best.loss, output_error(error, hessian), rtol=1e-9, atol=0)
    assert best.loss.sum() < 0.95 * solve(weight, hessian, QuantizeConfig(**fields)).loss.sum()
    assert best.weight.scales.dtype == torch.float16
    if grid != "symmetric":
        assert int(best.weight.zeros.min()) >= (1 if grid == "v1 zeros" else 0)
        assert int(best.weight.zeros.max()) < 2**bits


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [70, 300])
def test_rows_are_improved_in_chunks_that_change_nothing(rows, order, monkeypatch):
    weight, hessian = correlated(rows=rows, n=64)
    config = QuantizeConfig(bits=3, group_size=16, method="best", **ORDERS[order])
    whole, sizes = solve(weight, hessian, config), []
    monkeypatch.setattr(improve, "CHUNK_BYTES", 40 * 64 * (15 + 7 * config.clip_candidates))
    begin = improve.Recursion
    monkeypatch.setattr(improve, "Recursion", lambda w, *rest: sizes.append(w.shape[1]) or begin(w, *rest))
    parts = solve(weight, hessian, config)
    assert sizes == [32] * (rows // 32) + [rows % 32]
    assert torch.equal(parts.weight.codes, whole.weight.codes)
    assert torch.equal(parts.weight.scales, whole.weight.scales)


@pytest.mark.parametrize("options", [{}, {"sym": False, "group_size": -1}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_a_block_of_rows_is_improved_to_the_bit_whatever_blocks_are_beside_it(order, options):
    weight, hessian = (t.float() for t in correlated(rows=1300, n=64))
    config = QuantizeConfig(**{"bits": 3, "group_size": 32, "method": "best", **ORDERS[order], **options})
    blocks, whole = divided(weight), solve(weight, hessian, config)
    for first, last in ((0, 1), (2, 5)):
        part = solve_blocks(blocks[first:last], hessian, config)
        start, stop = first * blocks.shape[1], min(last * blocks.shape[1], 1300)
        found, wanted = part.first(stop - start), whole.weight.rows(start, stop)
        assert torch.equal(found.weight.codes, wanted.codes) and torch.equal(found.weight.scales, wanted.scales)
        assert torch.equal(found.weight.zeros, wanted.zeros) and torch.equal(found.loss, whole.loss[start:stop])


@pytest.mark.parametrize("order", ORDERS)
def test_the_size_of_a_row_changes_its_scales_and_its_loss_only(order):
    weight, hessian = (t.float() for t in correlated(rows=6, n=64))
    sizes = 2.0 ** torch.tensor([-3, -1, 0, 2, 5, 9])
    config = QuantizeConfig(bits=3, group_size=16, method="best", **ORDERS[order])
    usual, sized = (solve(w, hessian, config) for w in (weight, weight * sizes[:, None]))
    assert torch.equal(sized.weight.codes, usual.weight.codes)
    assert torch.equal(sized.weight.scales, usual.weight.scales * sizes)
    assert torch.equal(sized.loss, usual.loss * sizes.square())


def test_where_products_are_of_float16_the_steps_stay_as_accurate_and_errors_within_its_range(monkeypatch):
    weight, hessian = (t.float() for t in correlated(rows=24, n=160))
    monkeypatch.setitem(refine.sweep.__globals__, "SPAN", 32)
    tensor_cores = refine.sweep.__globals__["tensor_cores"]
    pushed, narrowed = [], tensor_cores.narrowed

    def watch(x, scale):
        pushed.append(float((x * scale).abs().max()))
        return narrowed(x, scale)

    monkeypatch.setattr(tensor_cores, "narrowed", watch)
    config = QuantizeConfig(bits=2, group_size=32, method="best")
    results = []
    for usable in (False, True):
        monkeypatch.setattr(tensor_cores, "usable", lambda x, usable=usable: usable)
        results.append(solve(weight, hessian, config))
    assert pushed and all(one < 2**15 for one in pushed)
    assert abs(results[1].loss.sum() / results[0].loss.sum() - 1) < 0.02


def test_dead_inputs_groups_of_zeros_and_singular_equations_change_nothing_for_the_worse():
    weight, hessian = (t.float() for t in correlated(rows=8, n=96))
    weight[:, 32:64] = 0
    weight[3] = 0
    hessian[[3, 70]] = 0
    hessian[:, [3, 70]] = 0
    config = QuantizeConfig(bits=3, group_size=32, method="best")
    solution = solve(weight, hessian, config)
    assert solution.method == "gptq" and bool(torch.isfinite(solution.loss).all())
    assert bool((solution.weight.scales > 0).all()) and bool(torch.isfinite(solution.weight.scales).all())
    assert not solution.weight.dequantize()[:, 32:64].any() and not solution.weight.dequantize()[3].any()
    assert solution.loss.sum() <= solve(weight, hessian, plain(bits=3, group_size=32)).loss.sum()


@pytest.mark.parametrize("order", ORDERS)
def test_a_scale_beyond_float16_is_refused_by_the_best_method_too(order):
    weight, hessian = correlated(rows=4, n=64)
    weight[0, 0] = 6e5
    with pytest.raises(ValueError, match="a weight of 6e\\+05 needs a scale above float16's 65504"):
        solve(weight, hessian, QuantizeConfig(group_size=32, method="best", **ORDERS[order]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group_size", [128, -1])
def test_a_gpu_improves_rows_as_the_cpu_does(group_size, grid, order):
    weight, hessian = (t.float() for t in correlated(rows=96, n=512))
    config = QuantizeConfig(bits=3, group_size=group_size, method="best", **GRIDS[grid], **ORDERS[order])
    cpu, gpu = (solve(weight.to(where), hessian.to(where), config) for where in ("cpu", "cuda"))
    error = weight.double() - gpu.weight.dequantize(torch.float64).cpu()
    torch.testing.assert_close(gpu.loss.cpu().double(), output_error(error, hessian.double()), rtol=1e-3, atol=0)
    assert abs(float(gpu.loss.sum().cpu() / cpu.loss.sum()) - 1) < 0.01
