"""Blocks solved anew: by what, which layers, and what stays where the result is no better."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from gptq_plugin import Finish, QuantLinear
from gptq_plugin.finish import block_walk, finish_model
from gptq_plugin.finish import solving as solving_again
from gptq_plugin.finish.block_training import Task
from gptq_plugin.finish.block_walk import weights_of
from gptq_plugin.finish.chain import Chain
from gptq_plugin.finish.solving import solve_again
from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.gptq.solver import solve
from gptq_plugin.layers.stored_weight import PACKED

from finish_cases import BLOCKS, changed, kinds_of, quantized, rows, same, state_of
from models import tiny_llama

CPU = torch.device("cpu")


def case(counted=None, **options):
    """The second block of a quantized model, its float weights, and its tasks behind the first one."""
    model, twin, quantizer = quantized(tiny_llama, **options)
    chain, tasks = Chain.of(model), []
    with torch.no_grad():
        for batch in torch.stack(rows(40)).split(8):
            with chain.watching(twin):
                twin(input_ids=batch, use_cache=False)
                passage = chain.take()
            first, second = passage.calls
            before = first.run(twin.model.layers[0], passage.hidden)
            hidden = first.run(model.model.layers[0], passage.hidden)
            wanted = second.run(twin.model.layers[1], before)
            positions = hidden[..., 0].numel() if counted is None else int(counted.sum())
            tasks.append(Task(second, hidden, wanted, before, counted, positions))
    block = model.model.layers[1]
    layers = {name: one for name, one in block.named_modules() if isinstance(one, QuantLinear)}
    weights = {name: weight for name, weight in weights_of(twin.model.layers[1]).items() if name in layers}
    return block, layers, weights, tasks, quantizer.config


def solving(config, found):
    def solver(name, layer, weight, hessian, drift):
        found[name] = weight, hessian, drift
        return solve(weight, hessian, config, drift).weight

    return solver


@torch.no_grad()
def error(block, tasks):
    return sum(float(task.squares(task.output(block, CPU))) for task in tasks)


def test_layers_are_solved_in_order_by_what_they_read_behind_the_trained_blocks_and_in_the_float_model(monkeypatch):
    """No quantized layer is called: on a GPU it would take its tensors into another layout, and keep them there."""
    mask = torch.arange(8 * 24) % 3 > 0
    block, layers, weights, tasks, config = case(mask, method="best")
    for task in tasks:  # as if the block before it had been trained
        task.hidden.copy_(0.4 * task.hidden + 0.6 * task.before)
    before, found, held_out = error(block, tasks[-1:]), {}, {0: tasks[-1]}
    with monkeypatch.context() as inside:
        inside.setattr(QuantLinear, "forward", lambda *_: pytest.fail("called"))
        solved = solve_again("b", block, weights, tasks[:-1], held_out, solving(config, found), CPU)
    assert [name.removeprefix("b.") for name in found] == list(solved) and solved.keys() == layers.keys()
    assert (
        all(block.get_submodule(name) is layer for name, layer in layers.items()) and error(block, tasks[-1:]) == before
    )
    inputs = {"self_attn.q_proj": [], "mlp.down_proj": []}
    for name, layer in solved.items():
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, layer)
    assert error(block, tasks[-1:]) < before
    for name, seen in inputs.items():
        layer = block.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)[mask]))
    with torch.no_grad():
        for task in tasks[:-1]:
            task.output(block, CPU)
    for name, seen in inputs.items():
        x = torch.cat(seen).double()
        weight, hessian, _ = found[f"b.{name}"]
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(weight, weights[name])
    floats = torch.cat([task.before.flatten(0, 1)[mask] for task in tasks[:-1]]).double()
    ours = torch.cat([task.hidden.flatten(0, 1)[mask] for task in tasks[:-1]]).double()
    norm = block.input_layernorm
    floats, ours = norm(floats.float()).double(), norm(ours.float()).double()
    drift = (floats - ours).T @ ours / len(ours)
    torch.testing.assert_close(found["b.self_attn.q_proj"][2].double(), drift, rtol=1e-3, atol=1e-4)


def test_what_is_no_better_on_held_out_samples_and_what_is_not_solved_stays():
    block, layers, weights, tasks, config = case()
    before = state_of(block)
    held_out = dict(enumerate(tasks[3:]))

    def rough(name, layer, weight, hessian, drift):
        return round_to_nearest(weight, config)

    assert solve_again("b", block, weights, tasks[:3], held_out, rough, CPU) == {}
    assert solve_again("b", block, weights, tasks[:3], held_out, lambda *_: None, CPU) == {}
    assert solve_again("b", block, weights, [], held_out, rough, CPU) == {}
    assert solve_again("b", block, weights, tasks[:3], {}, solving(config, {}), CPU) == {}

    def broken(name, layer, weight, hessian, drift):
        found = round_to_nearest(weight, config)
        return dataclasses.replace(found, scales=torch.full_like(found.scales, torch.nan))

    assert solve_again("b", block, weights, tasks[:3], held_out, broken, CPU) == {}
    assert same(state_of(block), before) and all(block.get_submodule(name) is one for name, one in layers.items())


def test_layers_of_experts_those_called_twice_and_those_without_a_float_weight_keep_their_codes():
    block, layers, weights, tasks, config = case()
    found = {}
    solve_again("mlp.experts.3", block, weights, tasks[:4], {0: tasks[4]}, solving(config, found), CPU)
    assert found == {}
    others = {name: weight for name, weight in weights.items() if "v_proj" not in name}

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = block

        def forward(self, hidden, **others):
            return self.inner(hidden, **others) + self.inner.mlp(hidden)

    twice = {f"inner.{name}": weight for name, weight in others.items()}
    solve_again("b", Twice(), twice, tasks[:4], {0: tasks[4]}, solving(config, found), CPU)
    assert found.keys() == {f"b.inner.self_attn.{one}_proj" for one in "qko"}


def test_inputs_that_are_not_finite_solve_nothing():
    block, _, weights, tasks, config = case()
    tasks[0].hidden[0, 0, 0] = torch.inf
    found = {}
    assert solve_again("b", block, weights, tasks[:4], {0: tasks[4]}, solving(config, found), CPU) == {}
    assert found == {}


@pytest.mark.parametrize(
    ("options", "others"), [({"sym": False}, set()), ({"desc_act": True, "static_groups": False}, {"g_idx"})]
)
def test_every_block_is_solved_by_its_layers_configuration_the_first_one_to_gptqs_bytes_and_can_be_undone(
    options, others, monkeypatch
):
    """What the first block reads is what GPTQ read."""
    model, twin, quantizer = quantized(**options)
    before, taken, errors = state_of(model), [], itertools.count(0, -1)
    original = block_walk.solve_again

    def noted(name, block, *given):
        solved = original(name, block, *given)
        old = {f"{one}.{field}": getattr(block.get_submodule(one), field) for one in solved for field in PACKED}
        new = {f"{one}.{field}": getattr(layer, field) for one, layer in solved.items() for field in PACKED}
        assert len(solved) == 7
        taken.append(kinds_of(changed(old, new)))
        return solved

    monkeypatch.setattr(block_walk, "solve_again", noted)
    monkeypatch.setattr(solving_again, "_error", lambda *_: next(errors))
    monkeypatch.setattr(finish_model._Work, "_judged", lambda _: next(errors))
    record = quantizer.finish(model, twin, rows(), Finish(**BLOCKS))
    assert record.kept and len(record.blocks) == 2
    assert taken[0] == set() and taken[1] - {"qzeros"} == {"qweight", "scales"} | others
    quantizer.undo_finish("tested")
    assert same(state_of(model), before)


def test_layers_that_a_rule_leaves_float_today_keep_their_codes():
    model, twin, quantizer = quantized()
    config = dataclasses.replace(quantizer.config, dynamic={r"-:.*down_proj": {}})
    solver = type(quantizer)(config)._solver(model)
    layer = model.model.layers[0].mlp.down_proj
    weight = twin.model.layers[0].mlp.down_proj.weight
    hessian = torch.eye(weight.shape[1])
    assert solver("model.layers.0.mlp.down_proj", layer, weight, hessian, 0 * hessian) is None
    solved = solver("model.layers.0.mlp.up_proj", layer, weight, hessian, 0 * hessian)
    assert (solved.bits, solved.group_size) == (layer.bits, layer.group_size)
