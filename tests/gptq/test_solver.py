"""The solver against a column-by-column GPTQ in float64, written from the paper with an explicit inverse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gptq_plugin.kernels import plain_solve, reference

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq import solver, sweep
from gptq_plugin.gptq.grid import grid, round_to_nearest
from gptq_plugin.gptq.losses import output_error
from gptq_plugin.gptq.row_blocks import divided
from gptq_plugin.gptq.solver import solve, solve_blocks

from plain_gptq import ORDERS, correlated, plain, plain_gptq


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_the_paper_column_by_column(bits, sym, order):
    weight, hessian = correlated(rows=24, n=192)
    config = plain(bits=bits, group_size=32, sym=sym, **ORDERS[order])
    solution = solve(weight, hessian, config)
    codes, dequantized = plain_gptq(weight, hessian, config)
    assert torch.equal(solution.weight.codes, codes)
    torch.testing.assert_close(solution.weight.dequantize(torch.float64), dequantized)
    assert solution.method == "gptq" and solution.deviations == ()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "size"), [(96, 48), (200, 8), (200, 200), (200, -1), (384, 192), (520, 260), (7, 7)])
def test_odd_shapes_equal_the_paper(n, size, order):
    weight, hessian = correlated(rows=5, n=n, seed=n)
    config = plain(bits=3, group_size=size, **ORDERS[order])
    assert torch.equal(solve(weight, hessian, config).weight.codes, plain_gptq(weight, hessian, config)[0])


@pytest.mark.parametrize("order", ORDERS)
def test_static_groups_are_solved_in_spans_of_their_own_width_and_others_group_by_group(order, monkeypatch):
    """A span that leaves one column for the last is solved too."""
    monkeypatch.setattr(sweep, "SPAN", 32)
    spans, solve_span = [], plain_solve.solve_span
    monkeypatch.setattr(
        plain_solve, "solve_span", lambda pushed, *rest: spans.append(pushed.shape[1]) or solve_span(pushed, *rest)
    )
    weight, hessian = correlated(rows=5, n=65)
    config = plain(bits=3, group_size=13, **ORDERS[order])
    solution, (codes, dequantized) = solve(weight, hessian, config), plain_gptq(weight, hessian, config)
    assert torch.equal(solution.weight.codes, codes)
    torch.testing.assert_close(solution.loss, output_error(weight - dequantized, hessian))
    assert spans == ([32, 32, 1] if config.static_groups else [13] * 5)


@pytest.mark.parametrize("order", ORDERS)
def test_groups_are_contiguous_unless_the_original_act_order_is_asked(order):
    weight, hessian = correlated(rows=4, n=128)
    config = plain(group_size=32, **ORDERS[order])
    trivial = torch.arange(128, dtype=torch.int32) // 32
    g_idx = solve(weight, hessian, config).weight.g_idx
    assert torch.equal(g_idx, trivial) == (order != "original act-order")
    assert torch.equal(torch.bincount(g_idx), torch.full((4,), 32))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_real_weights_and_hessians_give_the_papers_codes_and_beat_rounding(pycode_layers, bits):
    config = plain(bits=bits, group_size=128)
    for name, (weight, hessian) in pycode_layers.items():
        reference, dequantized = plain_gptq(weight, hessian, config)
        exact = solve(weight.double(), hessian.double(), config)
        assert torch.equal(exact.weight.codes, reference), name
        single = solve(weight.float(), hessian.float(), config)
        same = (single.weight.codes == reference).double().mean().item()
        assert same >= 0.999, f"{name}: only {same:.5f} of the codes agree in float32"
        error = weight.double() - dequantized
        loss = ((error @ hessian.double()) * error).sum()
        assert abs(single.loss.sum().double() / loss - 1) < 1e-3
        assert single.loss.sum() < 0.8 * single.rtn_loss.sum(), name


def test_every_row_keeps_the_clip_ratio_with_the_least_output_error():
    weight, hessian = correlated(rows=32, n=256)
    ratios = (0.7, 1.0)
    each = [solve(weight, hessian, plain(bits=3, group_size=32, clip_ratios=(ratio,))) for ratio in ratios]
    best = solve(weight, hessian, plain(bits=3, group_size=32, clip_ratios=ratios))
    losses = torch.stack([solution.loss for solution in each])
    torch.testing.assert_close(best.loss, losses.amin(0))
    assert len(losses.argmin(0).unique()) > 1  # rows differ, so there is something to choose
    for row, which in enumerate(losses.argmin(0).tolist()):
        assert torch.equal(best.weight.codes[row], each[which].weight.codes[row])
        assert torch.equal(best.weight.scales[:, row], each[which].weight.scales[:, row])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_of_many_clip_ratios_the_forecast_solves_nearly_the_best(bits, order):
    weight, hessian = correlated(rows=64, n=384)
    ratios = tuple(1 - 0.05 * i for i in range(11))
    config = plain(bits=bits, group_size=64, clip_ratios=ratios, **ORDERS[order])
    each = [solve(weight, hessian, dataclasses.replace(config, clip_ratios=(ratio,))).loss for ratio in ratios]
    least = torch.stack(each).amin(0).sum()
    found = solve(weight, hessian, config).loss.sum()
    first = solve(weight, hessian, dataclasses.replace(config, clip_ratios=(1.0,))).loss.sum()
    assert least <= found < (1.3 if bits == 2 else 1.08) * least
    assert found - least < (0.5 if bits == 2 else 0.25) * (first - least)  # it keeps most of what there is to gain


def test_the_order_of_the_clip_ratios_does_not_matter():
    weight, hessian = correlated(rows=16, n=128)
    up, down = (
        solve(weight, hessian, plain(bits=3, group_size=32, clip_ratios=ratios))
        for ratios in ((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    )
    assert torch.equal(up.weight.codes, down.weight.codes)


@pytest.mark.parametrize("rank", [192, 40])
@pytest.mark.parametrize("rows", [24, 300])
def test_the_power_of_the_output_is_its_mean_square_over_tokens(rows, rank):
    torch.manual_seed(0)
    weight, x = torch.randn(rows, 192, dtype=torch.float64), torch.randn(400, rank, dtype=torch.float64)
    x = x @ torch.randn(rank, 192, dtype=torch.float64)
    for damp_percent in (0.01, 0.3):  # damping is no part of it
        solution = solve(weight, x.T @ x / 400, plain(group_size=64, damp_percent=damp_percent))
        torch.testing.assert_close(solution.output_power, (x @ weight.T).square().mean(0))
    nothing = solve(weight, torch.zeros(192, 192, dtype=torch.float64), plain(group_size=64))
    assert nothing.method == "rtn" and torch.equal(nothing.output_power, torch.zeros(rows, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"sym": False, "group_size": -1}, {"clip_ratios": (1.0,)}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dead", [False, True])
def test_a_block_of_rows_is_solved_to_the_bit_whatever_blocks_are_beside_it(order, options, dead):
    weight, hessian = (t.float() for t in correlated(rows=1300, n=96))
    if dead:
        hessian.zero_()  # no input reached it: it is rounded
    config = QuantizeConfig(**{"bits": 3, "group_size": 32, **ORDERS[order], **options})
    blocks = divided(weight)
    assert blocks.shape[0] == 5
    whole = solve(weight, hessian, config)
    for first, last in ((0, 1), (1, 3), (2, 5), (4, 5)):
        part = solve_blocks(blocks[first:last], hessian, config)
        start, stop = first * blocks.shape[1], min(last * blocks.shape[1], 1300)
        found, wanted = part.first(stop - start), whole.weight.rows(start, stop)
        assert torch.equal(found.weight.codes, wanted.codes)
        assert torch.equal(found.weight.scales, wanted.scales) and torch.equal(found.weight.zeros, wanted.zeros)
        assert torch.equal(found.weight.g_idx, wanted.g_idx)
        assert torch.equal(found.loss, whole.loss[start:stop])
        assert torch.equal(found.rtn_loss, whole.rtn_loss[start:stop])
        assert torch.equal(found.output_power, whole.output_power[start:stop])
        assert (found.method, found.deviations) == (whole.method, whole.deviations)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False])
def test_a_clipped_grid_covers_its_part_of_the_range(sym, order):
    weight, hessian = correlated(rows=8, n=64)
    whole, part = (
        solve(weight, hessian, plain(group_size=64, sym=sym, clip_ratios=(ratio,), **ORDERS[order]))
        for ratio in (1.0, 0.75)
    )
    assert torch.equal(whole.weight.zeros, part.weight.zeros)
    torch.testing.assert_close(part.weight.scales.double(), 0.75 * whole.weight.scales.double(), rtol=2e-3, atol=0)


def test_stacked_rows_get_the_codes_they_get_alone():
    weight, hessian = correlated(rows=48, n=128)
    config = plain(group_size=32)
    together = solve(weight, hessian, config)
    for start, stop in ((0, 16), (16, 40), (40, 48)):
        alone = solve(weight[start:stop], hessian, config)
        part = together.weight.rows(start, stop)
        assert torch.equal(part.codes, alone.weight.codes)
        assert torch.equal(part.scales, alone.weight.scales)
        torch.testing.assert_close(together.loss[start:stop], alone.loss)


@pytest.mark.parametrize("options, shape", [({}, (2, 320, 32)), ({"in_blocks": False}, (1, 600, 32))])
def test_rows_are_solved_in_blocks_unless_it_is_asked_otherwise_and_filling_is_cut_off(options, shape, monkeypatch):
    weight, hessian = correlated(rows=600, n=32)
    shapes, solve_all = [], solver.solve_blocks
    monkeypatch.setattr(
        solver, "solve_blocks", lambda blocks, *rest: shapes.append(blocks.shape) or solve_all(blocks, *rest)
    )
    solution = solve(weight, hessian, plain(group_size=32), **options)
    assert shapes == [shape] and len(solution.loss) == 600
    assert torch.equal(solution.weight.codes, plain_gptq(weight, hessian, plain(group_size=32))[0])


def test_reported_losses_are_the_output_errors():
    weight, hessian = correlated(rows=6, n=64)
    config = plain(bits=3, group_size=32)
    x = torch.linalg.cholesky(hessian).T  # xᵀx = H
    solution = solve(weight, hessian, config)
    for quantized, loss in (
        (solution.weight, solution.loss),
        (round_to_nearest(weight, config), solution.rtn_loss),
    ):
        outputs = x @ (weight - quantized.dequantize(torch.float64)).T
        torch.testing.assert_close(loss, outputs.square().sum(0))
        torch.testing.assert_close(loss, output_error(weight - quantized.dequantize(torch.float64), hessian))


def test_dead_inputs_are_rounded_to_nearest_and_cost_nothing():
    weight, hessian = correlated(rows=8, n=64)
    dead = [3, 17, 40]
    hessian[dead] = 0
    hessian[:, dead] = 0
    for dtype in (torch.float32, torch.float64):
        solution = solve(weight.to(dtype), hessian.to(dtype), plain(group_size=32))
        nearest = round_to_nearest(weight.to(dtype), plain(group_size=32))
        assert solution.method == "gptq"
        assert torch.equal(solution.weight.codes[:, dead], nearest.codes[:, dead])
        assert torch.isfinite(solution.loss).all()


def test_a_layer_no_input_reached_is_rounded_and_reported():
    weight, _ = correlated(rows=4, n=64)
    solution = solve(weight, torch.zeros(64, 64, dtype=torch.float64), plain(group_size=32))
    assert solution.method == "rtn"
    assert solution.deviations == ("no calibration input reached this layer: round-to-nearest",)
    assert solution.damp_percent == QuantizeConfig().damp_percent and not solution.loss.any()
    assert torch.equal(solution.weight.codes, round_to_nearest(weight, plain(group_size=32)).codes)


def nearly_singular(n=64):
    """Positive semidefinite in float64, but with rounding that makes it indefinite in float32."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, n, generator=g, dtype=torch.float64) * torch.logspace(0, -5, n, dtype=torch.float64)
    x = x @ torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    return x.T @ x


def test_a_hessian_too_singular_for_float32_is_factored_in_float64_and_reported():
    weight, _ = correlated(rows=4, n=64)
    config = plain(group_size=32, damp_percent=1e-12)
    solution = solve(weight.float(), nearly_singular().float(), dataclasses.replace(config, damp_percent=1e-7))
    assert solution.method == "gptq" and solution.damp_percent == 1e-7
    assert solution.deviations == ("Hessian factored in float64 after float32 failed",)
    assert solution.loss.dtype == solution.rtn_loss.dtype == torch.float32
    assert bool((solution.loss < solution.rtn_loss).all())


def test_an_indefinite_hessian_gets_more_damping_and_the_amount_is_reported():
    weight, hessian = correlated(rows=4, n=64)
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    solution = solve(weight, hessian, plain(group_size=32, damp_percent=0.001, damp_auto_increment=0.01))
    assert solution.method == "gptq"
    assert solution.damp_percent == 0.101  # 0.001 + 0.01 was not enough, + 0.1 was
    assert solution.deviations == ("damp_percent raised from 0.001 to 0.101",)
    nearest = round_to_nearest(weight, plain(group_size=32)).dequantize(torch.float64)
    torch.testing.assert_close(solution.rtn_loss, output_error(weight - nearest, hessian))


@pytest.mark.parametrize("increment", [0.0, 0.01])
def test_a_hessian_without_factor_falls_back_to_rounding_loudly(increment):
    weight, hessian = correlated(rows=4, n=64)
    config = plain(group_size=32, damp_auto_increment=increment)
    hessian[0, 1] = hessian[1, 0] = 1e6  # no damping below 1 makes this definite
    hessian *= 1e-9  # inputs reached the layer, however small
    solution = solve(weight, hessian, config)
    assert solution.method == "rtn"
    last = 0.01 if increment == 0 else 0.11
    assert solution.deviations == (f"no Cholesky factor up to damp_percent {last:g}: round-to-nearest",)
    assert solution.damp_percent == pytest.approx(last)
    assert torch.equal(solution.weight.codes, round_to_nearest(weight, config).codes)
    torch.testing.assert_close(solution.loss, solution.rtn_loss)
    nearest = round_to_nearest(weight, config).dequantize(weight.dtype)
    torch.testing.assert_close(solution.loss, output_error(weight - nearest, hessian))


def test_a_group_of_zeros_stays_zero_and_tiny_weights_keep_a_scale():
    weight, hessian = correlated(rows=4, n=64)
    weight[:, :32] = 0
    weight[2] *= 1e-7
    solution = solve(weight, hessian, plain(group_size=32, static_groups=True))
    assert bool((solution.weight.scales > 0).all())
    assert bool(torch.isfinite(solution.weight.dequantize()).all())
    assert bool((solution.weight.dequantize()[:, :32] == 0).all())


@pytest.mark.parametrize(("which", "message"), [("weight", "weight holds NaN"), ("hessian", "Hessian holds NaN")])
def test_nan_is_refused(which, message):
    weight, hessian = correlated(rows=4, n=64)
    for place in ((0, 1), (0, 0)):  # beside the diagonal and on it
        wrong = weight.clone(), hessian.clone()
        (wrong[0] if which == "weight" else wrong[1])[[*place], [*place[::-1]]] = float("nan")
        with pytest.raises(ValueError, match=message):
            solve(*wrong, plain(group_size=32))


@pytest.mark.parametrize("order", ORDERS)
def test_a_scale_beyond_float16_is_refused(order):
    weight, hessian = correlated(rows=4, n=64)
    with pytest.raises(ValueError, match="a weight of .* needs a scale above float16's 65504"):
        solve(weight * 1e8, hessian, plain(group_size=32, **ORDERS[order]))
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(64)  # needs more damping than was asked
    with pytest.raises(ValueError, match="a weight of .* needs a scale above float16's 65504"):
        solve(weight * 1e8, hessian, plain(group_size=32, damp_percent=0.001, **ORDERS[order]))


@pytest.mark.parametrize("order", ORDERS)
def test_an_outlier_is_refused_and_not_clipped_away_though_a_narrower_grid_could_be_stored(order):
    weight, hessian = correlated(rows=4, n=64)
    weight[0, 0] = 6e5
    for ratios in ((1.0,), (1.0, 0.5), (1.0, 0.5, 0.45), QuantizeConfig().clip_ratios):
        with pytest.raises(ValueError, match="a weight of 6e\\+05 needs a scale above float16's 65504"):
            solve(weight, hessian, plain(group_size=32, clip_ratios=ratios, **ORDERS[order]))
    narrow = solve(weight, hessian, plain(group_size=32, clip_ratios=(0.5,), **ORDERS[order]))
    assert narrow.method == "gptq"  # as it was asked


@pytest.mark.parametrize("ratios", [(1.0,), (1.0, 0.5, 0.45), (1.0, 0.5, 0.49, 0.48, 0.47)])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_a_weight_that_cannot_be_stored_is_found_in_every_block_of_rows(order, block, ratios):
    weight, hessian = correlated(rows=4, n=64)
    blocks = torch.stack([weight, weight])
    blocks[block, 0, 0] = 6e5
    with pytest.raises(ValueError, match="a weight of 6e\\+05 needs a scale above float16's 65504"):
        solve_blocks(blocks, hessian, plain(group_size=32, clip_ratios=ratios, **ORDERS[order]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(dtype, order):
    """Lightning's true 16-bit precisions set it."""
    weight, hessian = (t.to(dtype) for t in correlated(rows=6, n=64))
    config = QuantizeConfig(bits=3, group_size=16, **ORDERS[order])
    usual, before = solve(weight, hessian, config), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        solution = solve(weight, hessian, config)
    finally:
        torch.set_default_dtype(before)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(solution.weight, name), getattr(usual.weight, name)), name
    assert torch.equal(solution.loss, usual.loss) and torch.equal(solution.rtn_loss, usual.rtn_loss)


def test_codes_can_be_sent_between_ranks_as_they_lie():
    weight, hessian = correlated(rows=4, n=64)
    codes = solve(weight, hessian, plain(group_size=32)).weight.codes
    assert codes.is_contiguous() or codes.mT.is_contiguous()  # NCCL takes no other; see distributed.from_first


def test_a_16_bit_weight_is_solved_in_the_hessians_precision():
    weight, hessian = correlated(rows=4, n=64)
    config = plain(group_size=32)
    half = weight.to(torch.bfloat16)
    assert torch.equal(solve(half, hessian, config).weight.codes, solve(half.double(), hessian, config).weight.codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_part_of_a_solution_has_its_shape_and_type_and_lies_where_the_weight_does(dtype, order):
    weight, hessian = (t.to(dtype) for t in correlated(rows=6, n=64))
    config = QuantizeConfig(bits=3, group_size=16, sym=False, **ORDERS[order])
    with torch.device("meta"):  # not where new tensors happen to be made
        solution = solve(weight.requires_grad_(), hessian, config)
    expected = {"codes": ((6, 64), torch.uint8), "scales": ((4, 6), torch.float16), "zeros": ((4, 6), torch.uint8),
                "g_idx": ((64,), torch.int32)}  # fmt: skip
    for name, (shape, kind) in expected.items():
        value = getattr(solution.weight, name)
        assert (value.shape, value.dtype, value.device) == (shape, kind, weight.device), name
    usual = solve(weight, hessian, config)
    assert torch.equal(solution.weight.dequantize(), usual.weight.dequantize())
    assert torch.equal(solution.loss, usual.loss) and torch.equal(solution.rtn_loss, usual.rtn_loss)
    for loss in (solution.loss, solution.rtn_loss):
        assert loss.shape == (6,) and loss.dtype == dtype and not loss.requires_grad
    assert (solution.weight.bits, solution.weight.group_size) == (3, 16)
    assert (solution.method, solution.damp_percent, solution.deviations) == ("gptq", config.damp_percent, ())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_size_of_each_row_changes_its_scales_and_its_loss_only(dtype, order):
    weight, hessian = (t.to(dtype) for t in correlated(rows=6, n=64))
    sizes = 2.0 ** torch.tensor([-6, -3, 0, 2, 5, 9])
    config = QuantizeConfig(bits=3, group_size=16, **ORDERS[order])
    plain_size, sized = (solve(w, hessian, config) for w in (weight, weight * sizes.to(dtype)[:, None]))
    assert torch.equal(sized.weight.codes, plain_size.weight.codes)
    assert torch.equal(sized.weight.scales, plain_size.weight.scales * sizes)
    assert torch.equal(sized.loss, plain_size.loss * sizes.to(dtype).square())


@pytest.mark.parametrize("order", ORDERS)
def test_losses_of_any_size_are_the_output_errors_in_every_order(order):
    weight, hessian = correlated(rows=6, n=96)
    for size in (1e-2, 10.0):  # losses far below and above 1
        solution = solve(weight * size, hessian, QuantizeConfig(bits=3, group_size=32, **ORDERS[order]))
        error = weight * size - solution.weight.dequantize(torch.float64)
        torch.testing.assert_close(solution.loss, output_error(error, hessian), rtol=1e-9, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_the_forecast_knows_what_an_error_costs_and_how_far_targets_move(order, monkeypatch):
    """For each input channel: D, and sqrt(sum of squared A_kj over the k before j, by 12), in the natural order of
    static groups, and else in the order columns are visited."""
    weight, hessian = correlated(rows=3, n=24)
    config = QuantizeConfig(bits=3, group_size=8, **ORDERS[order])
    told, clipping_errors = {}, reference.clipping_errors

    def watch(weight, scales, zeros, spread, gain, bits):
        told.update(weight=weight, spread=spread, gain=gain, bits=bits, widest=scales[0])
        return clipping_errors(weight, scales, zeros, spread, gain, bits)

    monkeypatch.setattr(reference, "clipping_errors", watch)
    solve(weight, hessian, config)
    by_diagonal = hessian.diagonal().argsort(descending=True, stable=True)
    visited = torch.arange(24) if order == "natural order" else by_diagonal
    damped = hessian + config.damp_percent * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    last_first = visited.flip(0)
    lower = torch.linalg.cholesky(damped[last_first][:, last_first])
    gain = lower.diagonal().square().flip(0)  # in the order of the visits, as all that follows
    pushes = (lower / lower.diagonal()).flip(0, 1)  # [k, j]: of the error at k, to j
    spread = torch.stack([(pushes[:j, j].square().sum() / 12).sqrt() for j in range(24)])
    back = visited.argsort() if config.static_groups else torch.arange(24)
    torch.testing.assert_close(told["gain"], gain[back])
    torch.testing.assert_close(told["spread"], spread[back], atol=1e-7, rtol=1e-6)
    seen = weight if config.static_groups else weight[:, visited]
    assert torch.equal(told["weight"], seen) and told["bits"] == 3
    assert torch.equal(told["widest"], grid(seen.unflatten(1, (3, 8)), config)[0])


def test_where_products_are_split_results_stay_as_accurate(monkeypatch):
    """As on a GPU, on a CPU: errors of a span are pushed on as float16 parts, and round-to-nearest's loss is rough."""
    weight, hessian = (t.float() for t in correlated(rows=24, n=160))
    monkeypatch.setattr(sweep, "SPAN", 32)
    pushed, right_operand = [], sweep.tensor_cores.right_operand

    def watch(x, scale):
        pushed.append(float((x * scale).abs().max()))
        return right_operand(x, scale)

    monkeypatch.setattr(sweep.tensor_cores, "right_operand", watch)
    for order in ORDERS.values():
        config = plain(bits=3, group_size=32, **order)
        results = []
        for usable in (False, True):
            monkeypatch.setattr(sweep.tensor_cores, "usable", lambda x, usable=usable: usable)
            results.append(solve_blocks(weight.unflatten(0, (2, 12)), hessian, config))
        whole, split = results
        assert bool(pushed) == config.static_groups and all(100 < one < 2**15 for one in pushed)
        assert (whole.weight.codes == split.weight.codes).float().mean() > 0.999
        torch.testing.assert_close(split.loss, whole.loss, rtol=1e-3, atol=0)
        assert split.rtn_loss.dtype == torch.float32 and not torch.equal(split.rtn_loss, whole.rtn_loss)
        torch.testing.assert_close(split.rtn_loss, whole.rtn_loss, rtol=1e-2, atol=0)
        pushed.clear()


def test_where_products_are_split_small_rows_are_as_accurate_as_large_ones(monkeypatch):
    """Each is solved in its own unit: float16 parts would lose the errors of a row in a larger one's."""
    weight, hessian = (t.float() for t in correlated(rows=6, n=96))
    monkeypatch.setattr(sweep, "SPAN", 16)
    monkeypatch.setattr(sweep.tensor_cores, "usable", lambda x: True)
    sizes = 2.0 ** torch.tensor([-6, -3, 0, 2, 5, 9])
    config = plain(bits=3, group_size=32)
    plain_size, sized = (solve(w, hessian, config) for w in (weight, weight * sizes[:, None]))
    assert torch.equal(sized.weight.codes, plain_size.weight.codes)
    assert torch.equal(sized.loss, plain_size.loss * sizes.square())


@pytest.fixture(scope="session")
def pycode_layers(shared):
    """Weights of pycode-29m with the Hessians of real text, by plain hooks: nothing of ours is used."""
    import json

    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared / "models" / "pycode-29m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with open(shared / "data" / "pycode" / "calib.jsonl") as lines:
        text = "".join(json.loads(next(lines))["text"] for _ in range(12))
    ids = torch.tensor(tokenizer(text)["input_ids"][: 16 * 256]).reshape(16, 256)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "model.layers.7.mlp.up_proj"]
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: inputs.__setitem__(name, args[0].flatten(0, 1).double())
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    rows = 192  # the reference is slow
    return {name: (model.get_submodule(name).weight.detach()[:rows], x.T @ x / len(x)) for name, x in inputs.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS)
def test_a_gpu_gives_the_papers_codes_even_where_the_trainer_allows_tf32(order):
    from gptq_plugin.walk.hessian import Hessian

    weight, hessian = correlated(rows=96, n=512)
    x = (torch.randn(4096, 512, dtype=torch.float64) @ torch.linalg.cholesky(hessian).T).cuda()
    reference = x.T @ x / len(x)
    config = plain(bits=4, group_size=128, **ORDERS[order])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        running = Hessian(512, "cuda")
        running.add(x.float())
        with torch.autocast("cuda", dtype=torch.bfloat16):
            solution = solve(weight.float().cuda(), running.mean(), config)
    finally:
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision(before)
    assert (running.mean().double() - reference).norm() / reference.norm() < 1e-5  # TF32 is near 3e-4
    codes, _ = plain_gptq(weight, reference.cpu(), config)
    assert (solution.weight.codes.cpu() == codes).double().mean() > 0.98
