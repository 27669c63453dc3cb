"""The Triton recursion over columns against the plain one in float64."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from gptq_plugin.kernels import plain_solve

from kernel_cases import Block, make_block, make_blocks, triton_device

BLOCKS = [(128, 40, 1, 1), (16, 1, 1, 1), (48, 17, 2, 2), (7, 33, 1, 2), (1, 5, 3, 1), (300, 300, 2, 2)]


@triton_device
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "rows", "batch", "alternatives"), BLOCKS)
def test_the_triton_block_is_the_plain_one(columns, rows, batch, alternatives, bits, device):
    from gptq_plugin.kernels import solve

    if device == "cpu":  # the interpreter is slow
        columns, rows = (131, 2) if columns > 200 and bits == 3 else (min(columns, 24), min(rows, 12))
    block = make_block(columns, rows, bits, device, batch=batch, alternatives=alternatives)
    exact = Block(**{k: v.double() if v.is_floating_point() else v for k, v in vars(block).items()})
    found, wanted = block.solve(solve.solve_span, bits), exact.solve(plain_solve.solve_span, bits)
    # A sum in float32 may fall on the other side of a near tie, and its row goes on from there.
    same = (found.codes == wanted.codes).all(dim=1)  # channels of other blocks are as they were in both
    assert same.double().mean() > 0.95
    assert not found.errors.isnan().any()
    together = same[:, None].expand_as(found.errors)
    torch.testing.assert_close(found.errors[together].double(), wanted.errors[together], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss[same].double(), wanted.loss[same], atol=1e-4, rtol=1e-4)
    for name in ("pushed", "weight", "factor", "scales", "zeros", "group", "channel", "gain", "damping"):
        assert torch.equal(getattr(found, name), getattr(block, name))  # only outputs are written


@triton_device
@pytest.mark.parametrize("bits", [2, 8])
def test_from_codes_so_far_the_triton_block_gives_the_change_of_the_loss(bits, device):
    from gptq_plugin.kernels import solve

    columns, rows = (32, 20) if device == "cpu" else (300, 300)
    block = make_block(columns, rows, bits, device, alternatives=2)
    codes = torch.randint(0, 2**bits, block.codes.shape, dtype=torch.uint8, device=device)
    block = dataclasses.replace(block, codes=codes, loss=torch.zeros_like(block.loss))
    exact = Block(**{k: v.double() if v.is_floating_point() else v for k, v in vars(block).items()})
    found = block.solve(functools.partial(solve.solve_span, changes=True), bits)
    wanted = exact.solve(functools.partial(plain_solve.solve_span, changes=True), bits)
    same = (found.codes == wanted.codes).all(dim=1)
    assert same.double().mean() > 0.95
    torch.testing.assert_close(found.loss[same].double(), wanted.loss[same], atol=1e-4, rtol=1e-4)
    again = dataclasses.replace(found, pushed=block.pushed, errors=block.errors, loss=block.loss)
    again.codes[:, :, 0] ^= 1  # of one row; the others' change is none at all
    last = again.solve(functools.partial(solve.solve_span, changes=True), bits).loss
    assert last[0, 0] != 0 and not last[0, 1:].any()


@triton_device
@pytest.mark.parametrize(("columns", "rows"), [(300, 40), (512, 33), (70, 5)])
def test_a_rough_block_rounds_targets_that_are_right_to_a_hundredth_of_a_step(columns, rows, device):
    from gptq_plugin.kernels import solve

    if device == "cpu":
        columns, rows = min(columns, 140), min(rows, 5)
    block = make_block(columns, rows, 4, device, alternatives=2)
    found = block.solve(functools.partial(solve.solve_span, rough=True), 4)
    channel, group = block.channel.long(), block.group.long()
    scale, zero, codes = (t[0].double() for t in (block.scales, block.zeros, found.codes))
    scale, zero, codes = scale[group], zero[group], codes[channel]
    weight = block.weight[0, channel].double().repeat(1, 2)
    errors = weight - scale * (codes - zero)
    torch.testing.assert_close(found.errors[0].double(), errors, atol=1e-5, rtol=1e-5)
    pushes = block.pushed[0].double() + block.factor.double().triu(1) @ errors
    wanted = ((weight + pushes) / scale + zero).clamp(0, 15)
    off = (wanted - codes).abs()
    assert off.max() < 0.55 and (off > 0.51).double().mean() < 1e-3
    loss = block.gain[:, None] * (pushes + errors).square() - block.damping[:, None] * errors.square()
    torch.testing.assert_close(found.loss[0].double(), block.loss[0].double() + loss.sum(0), atol=0, rtol=1e-2)


@triton_device
def test_the_triton_block_writes_into_runs_of_columns_of_longer_matrices(device):
    from gptq_plugin.kernels import solve

    whole = make_block(40, 6, 4, device, batch=2)
    columns, as_they_are = slice(8, 24), ("weight", "scales", "zeros", "codes", "loss")
    per_column = {name: getattr(whole, name)[columns] for name in ("group", "channel", "gain", "damping")}
    part = Block(
        **{name: getattr(whole, name) for name in as_they_are},
        **{name: getattr(whole, name)[:, columns] for name in ("pushed", "errors")},
        **per_column,
        factor=whole.factor[columns, columns],
    )
    alone = Block(**{name: value.contiguous().clone() for name, value in vars(part).items()})
    solve.solve_span(**vars(part), bits=4)
    solve.solve_span(**vars(alone), bits=4)
    for name in ("codes", "errors", "loss"):
        assert torch.equal(getattr(part, name), getattr(alone, name))
    outside = [*range(8), *range(24, 40)]
    assert whole.errors[:, outside].isnan().all()
    assert ((whole.codes != 255).all(2).sum(1) == 16).all()  # every column has its channel, and the others keep theirs


@triton_device
def test_the_triton_block_names_what_it_cannot_take(device):
    from gptq_plugin.kernels import solve

    block = make_block(16, 8, 4, device, batch=2)

    def solving(**changes):
        solve.solve_span(**{**vars(block), **changes}, bits=4)

    with pytest.raises(ValueError, match=r"weight must be torch.float32 \[2, 19, 8\]"):
        solving(weight=block.weight.double())
    with pytest.raises(ValueError, match="scales must be"):
        solving(scales=block.scales.mT.contiguous().mT)
    with pytest.raises(ValueError, match=r"factor must be torch.float32 \[16, 16\]"):
        solving(factor=block.factor[:8])
    with pytest.raises(ValueError, match=r"codes must be torch.uint8 \[2, 19, 8\] with strides"):
        solving(codes=torch.empty(2, 24, 8, dtype=torch.uint8, device=device)[:, :19])
    with pytest.raises(ValueError, match="group must be torch.int32"):
        solving(group=torch.zeros(32, dtype=torch.int32, device=device)[::2])


@triton_device
@pytest.mark.parametrize("columns", [32, 300])
def test_a_blocks_solution_does_not_depend_on_the_blocks_beside_it(columns, device):
    from gptq_plugin.kernels import solve

    if device == "cpu":
        columns = min(columns, 140)
    together = make_block(columns, 2 if device == "cpu" else 200, 4, device, batch=5, alternatives=2)
    by_block = ("pushed", "weight", "scales", "zeros", "codes", "errors", "loss")
    found = together.solve(solve.solve_span, 4)
    for b in (0, 3):
        own = {name: value[b : b + 1] if name in by_block else value for name, value in vars(together).items()}
        alone = Block(**own).solve(solve.solve_span, 4)
        for name in ("codes", "errors", "loss"):
            assert torch.equal(getattr(found, name)[b], getattr(alone, name)[0]), name


@triton_device
@pytest.mark.parametrize(("columns", "rows", "alternatives"), [(131, 5, 2), (300, 40, 2), (7, 33, 1)])
def test_blocks_with_a_factor_and_an_order_each_are_solved_as_if_they_were_alone(columns, rows, alternatives, device):
    from gptq_plugin.kernels import solve

    if device == "cpu":
        columns, rows = min(columns, 131), min(rows, 5)
    blocks = [make_block(columns, rows, 4, device, alternatives=alternatives, seed=seed) for seed in range(3)]
    alone = [block.solve(solve.solve_span, 4) for block in blocks]
    found = make_blocks(blocks).solve(solve.solve_span, 4)
    codes = torch.cat([one.codes for one in alone])
    same = (found.codes == codes).all(dim=1)  # a product of all blocks may be added up in another order
    assert same.double().mean() > 0.95
    loss = torch.cat([one.loss for one in alone])
    torch.testing.assert_close(found.loss[same], loss[same], atol=1e-4, rtol=1e-4)
