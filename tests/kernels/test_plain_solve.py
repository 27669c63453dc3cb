"""The plain recursion over a span of columns, number by number."""

from __future__ import annotations

import itertools

import pytest
import torch
from gptq_plugin.kernels import plain_solve

from kernel_cases import make_block, make_blocks


@pytest.mark.parametrize("at_once", [1, 4, 9, None])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_plain_block_is_the_recursion(bits, at_once, monkeypatch):
    if at_once is not None:
        monkeypatch.setattr(plain_solve, "_BLOCK", at_once)
    block = make_block(9, 5, bits, dtype=torch.float64, batch=2, alternatives=3)
    found = block.solve(plain_solve.solve_span, bits)
    for b, row in itertools.product(range(2), range(15)):
        loss = block.loss[b, row]
        for j in reversed(range(9)):
            channel, group = block.channel[j], block.group[j]
            w = block.weight[b, channel, row % 5]
            scale, zero = block.scales[b, group, row], block.zeros[b, group, row]
            t = w + block.pushed[b, j, row]
            t = t + sum(found.errors[b, k, row] * block.factor[j, k] for k in range(j + 1, 9))
            q = torch.round(t / scale + zero).clamp(0, 2**bits - 1)
            assert found.codes[b, channel, row] == q
            assert found.errors[b, j, row] == w - scale * (q - zero)
            loss = loss + block.gain[j] * (t - scale * (q - zero)) ** 2
            loss = loss - block.damping[j] * found.errors[b, j, row] ** 2
        torch.testing.assert_close(found.loss[b, row], loss)


@pytest.mark.parametrize("at_once", [4, None])
@pytest.mark.parametrize("changes", [False, True])
def test_blocks_with_a_factor_each_are_solved_as_if_they_were_alone(changes, at_once, monkeypatch):
    if at_once is not None:
        monkeypatch.setattr(plain_solve, "_BLOCK", at_once)
    blocks = [make_block(9, 5, 3, dtype=torch.float64, alternatives=2, seed=seed) for seed in range(4)]
    for block in blocks:
        block.codes.fill_(2)

    def by(*args, **kwargs):
        plain_solve.solve_span(*args, **kwargs, changes=changes)

    found = make_blocks(blocks).solve(by, 3)
    for number, block in enumerate(blocks):
        wanted = block.solve(by, 3)
        assert torch.equal(found.codes[number], wanted.codes[0])
        torch.testing.assert_close(found.loss[number], wanted.loss[0])
        torch.testing.assert_close(found.errors[number], wanted.errors[0])
