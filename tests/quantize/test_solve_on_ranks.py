"""Every rank solves a share of the rows, and all get the whole. Real processes: `tests/ranks/test_distributed.py`."""

from __future__ import annotations

import pytest
import torch
from plans import rows

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq import row_blocks, solver
from gptq_plugin.gptq.solver import solve, solve_blocks
from gptq_plugin.quantize import solve_on_ranks
from gptq_plugin.quantize.solve_on_ranks import solve_shared


class Met(Exception):
    """Ends a rank's call where all ranks would meet."""


@pytest.fixture
def ranks(monkeypatch):
    """ranks(size, weight, hessian, config, drift): each rank's solution, the blocks each solved, and the rows that are
    sent. The ranks run one after the other: first up to where they meet, and then on from there."""

    def run(size, weight, hessian, config, drift=None):
        messages, shares, sent = [], [], []

        def solved(own, *args):
            shares.append(len(own))
            return solve_blocks(own, *args)

        def leave(parts, count, sharers):
            assert {len(part) for part in parts} == {count}
            messages.append(parts)
            raise Met

        def go_on(parts, count, sharers):
            sent.append(sharers * count)
            return [list(of_all[:sharers]) for of_all in zip(*messages, strict=True)]

        monkeypatch.setattr(distributed, "world_size", lambda: size)
        monkeypatch.setattr(solve_on_ranks, "solve_blocks", solved)
        for meet in (leave, go_on):
            solutions = []
            monkeypatch.setattr(distributed, "gather_rows", meet)
            for rank in range(size):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                try:
                    solutions.append(solve_shared(weight, hessian, config, drift))
                except Met:
                    continue
        return solutions, shares[:size], sent

    return run


@pytest.mark.parametrize(
    ("size", "count", "share"), [(2, 1024, 2), (3, 2560, 4), (4, 1300, 2), (5, 600, 1), (2, 40, 1)]
)
@pytest.mark.parametrize("options", [{}, {"group_size": -1, "sym": False}, {"desc_act": True, "static_groups": False}])
def test_all_ranks_get_the_solution_of_the_whole(size, count, share, options, ranks):
    x = rows(96, 32).double()
    weight, hessian = rows(count, 32, seed=1), (x.T @ x / 96).float()
    config = QuantizeConfig(**{"bits": 3, "group_size": 16, **options})
    alone = solve(weight, hessian, config)
    solutions, shares, sent = ranks(size, weight, hessian, config)
    assert shares == [share] * size
    assert sent == [sent[0]] * size and count <= sent[0] < count + (share + 1) * 256  # no block is sent by every rank
    for solution in solutions:
        for part in ("codes", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(solution.weight, part), getattr(alone.weight, part)), part
        assert torch.equal(solution.loss, alone.loss) and torch.equal(solution.rtn_loss, alone.rtn_loss)
        assert torch.equal(solution.output_power, alone.output_power)
        assert (solution.method, solution.damp_percent) == (alone.method, alone.damp_percent)


@pytest.mark.parametrize("of_outputs", [False, True])
def test_all_ranks_get_the_solution_of_the_whole_with_a_drift(of_outputs, ranks, monkeypatch):
    monkeypatch.setattr(row_blocks, "_LEAST", {"cpu": 32})
    x, away = rows(400, 224), 0.1 * rows(400, 224, seed=2)
    weight, hessian, drift = rows(100, 224, seed=1), x.T @ x / 400, away.T @ x / 400
    drift = weight @ drift if of_outputs else drift
    config = QuantizeConfig(bits=3, group_size=32, asymmetric_alpha=0.5)
    alone = solve(weight, hessian, config, drift)
    assert not torch.equal(alone.weight.codes, solve(weight, hessian, config).weight.codes)
    solutions, shares, _ = ranks(3, weight, hessian, config, drift)
    assert shares == [1, 1, 1] and len(row_blocks.divided(weight)) == 2
    for solution in solutions:
        assert torch.equal(solution.weight.codes, alone.weight.codes)
        assert torch.equal(solution.loss, alone.loss)


@pytest.mark.parametrize("size", [1, 2])
def test_what_finds_no_room_is_solved_again_by_the_rank_that_made_some(size, monkeypatch):
    x = rows(96, 32)
    weight, hessian, config = rows(512, 32, seed=1), x.T @ x / 96, QuantizeConfig(group_size=16)
    alone = solve(weight, hessian, config)
    name = "solve" if size == 1 else "solve_blocks"
    right, made = getattr(solve_on_ranks, name), []

    def scarce(*args, **options):
        if not made:
            raise torch.OutOfMemoryError("no room")
        return right(*args, **options)

    monkeypatch.setattr(solve_on_ranks, name, scarce)
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    monkeypatch.setattr(distributed, "gather_rows", lambda parts, *_: [[part, part] for part in parts])
    found = solve_shared(weight, hessian, config, make_room=lambda: made.append(True) or True)
    assert made == [True] and torch.equal(found.weight.codes[:256], alone.weight.codes[:256])
    with pytest.raises(torch.OutOfMemoryError):
        made.clear()
        solve_shared(weight, hessian, config, make_room=lambda: False)


def test_without_a_process_group_it_is_the_solver(monkeypatch):
    monkeypatch.setattr(distributed, "gather_rows", lambda *_: pytest.fail("nobody to meet"))
    x, weight = rows(96, 32), rows(6, 32, seed=1)
    config = QuantizeConfig(group_size=16)
    assert torch.equal(solve_shared(weight, x.T @ x, config).weight.codes, solve(weight, x.T @ x, config).weight.codes)


def test_one_process_solves_in_blocks_only_if_it_is_to_give_what_several_would(monkeypatch):
    asked = []
    monkeypatch.setattr(solver, "solve_blocks", lambda blocks, *_: asked.append(len(blocks)) or Whole())
    for in_blocks in (True, False):
        solve_shared(rows(512, 32), torch.eye(32), QuantizeConfig(group_size=16), in_blocks=in_blocks)
    assert asked[0] > 1 and asked[1] == 1


class Whole:
    def first(self, count):
        return self


def test_values_that_are_not_finite_are_refused_by_the_rank_whose_rows_they_are_in(ranks):
    weight = rows(512, 32)
    weight[400, 0] = float("nan")
    with pytest.raises(ValueError, match="the weight holds NaN"):
        ranks(2, weight, torch.eye(32), QuantizeConfig(group_size=16))
