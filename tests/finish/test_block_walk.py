"""Blocks trained one by one, and the codes of the whole model: what changes, what is kept, what is left otherwise."""

from __future__ import annotations

import copy
import json
import signal

import pytest
import torch

from gptq_plugin import Finish, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.finish import block_training, finish_model, train
from gptq_plugin.finish.block_walk import weights_of
from gptq_plugin.finish.latent_codes import LatentCodes

from finish_cases import BLOCKS, changed, divergence, kinds_of, quantized, rows, same, state_of
from models import tiny_gpt2, tiny_llama


@pytest.mark.parametrize(
    ("make", "options", "steps"),
    [
        (tiny_llama, {"desc_act": True, "static_groups": False}, 20),
        (tiny_llama, {"sym": False}, 20),
        (tiny_gpt2, {}, 60),
    ],
    ids=["act-order", "zero-points", "gpt2"],
)
def test_blocks_are_nearer_to_their_float_outputs_and_codes_scales_and_norms_change(make, options, steps):
    model, twin, quantizer = quantized(make, **options)
    before, float_state, unseen = state_of(model), state_of(twin), rows(seed=9)
    apart = divergence(model, twin, unseen)
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    record = quantizer.finish(model, twin, rows(), Finish(**{**BLOCKS, "block_steps": steps}))
    assert record.kept and record.kind == "blocks" and quantizer.report.finish is record
    assert (
        record.after == pytest.approx(divergence(model, twin, rows()[32:]), rel=1e-4) and record.after < record.before
    )
    assert divergence(model, twin, unseen) < apart
    assert len(record.blocks) == 2
    for number, block in enumerate(record.blocks):
        assert block.name.endswith(f".{number}") and block.best_step <= block.steps <= steps
        assert (block.after < block.before) == (block.best_step > 0)
    assert record.blocks[0].best_step > 0
    solved_in_other_order = {"g_idx"} if options.get("desc_act") and any(one.solved for one in record.blocks) else set()
    assert kinds_of(changed(before, state_of(model))) - solved_in_other_order == {"qweight", "scales", "norm"}
    assert same(state_of(twin), float_state) and not model.training
    assert flags == {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert record.tokens >= steps * 192


@torch.no_grad()
def errors_of(model, twin, data):
    """By block, the squared error of its outputs behind the quantized blocks before it, for each position."""
    found, seen = [], [[], []]
    for one, states in zip((model, twin), seen, strict=True):
        for layer in one.model.layers:
            layer.register_forward_hook(lambda _, args, output, states=states: states.append((args[0], output)))
        one(input_ids=torch.stack(data))
    for (_, ours), (entered, theirs) in zip(*seen, strict=True):
        found.append((float((ours - theirs).square().mean()), float((theirs - entered).square().mean())))
    return found


def test_errors_are_those_of_blocks_on_held_out_samples_behind_the_trained_ones():
    model, twin, quantizer = quantized()
    before = errors_of(copy.deepcopy(model), copy.deepcopy(twin), rows()[32:])
    options = {**BLOCKS, "steps": 1, "learning_rate": 1e-9, "norm_learning_rate": 0}
    record = quantizer.finish(model, twin, rows(), Finish(**options))
    after = errors_of(copy.deepcopy(model), copy.deepcopy(twin), rows()[32:])
    units = [unit for _, unit in errors_of(copy.deepcopy(model), copy.deepcopy(twin), rows())]  # of all samples
    assert record.blocks[0].before == pytest.approx(before[0][0] / units[0], rel=1e-4)
    found = [error / unit for (error, _), unit in zip(after, units, strict=True)]
    assert [one.after for one in record.blocks] == pytest.approx(found, rel=1e-4)
    assert record.blocks[1].before < before[1][0] / units[1]  # the block before it is nearer to its float one


@pytest.mark.parametrize("kind", ["blocks", "full"])
def test_what_is_exported_is_what_was_judged_and_loads_bit_for_bit(kind, tmp_path):
    model, twin, quantizer = quantized()
    record = quantizer.finish(model, twin, rows(), Finish(**{**BLOCKS, "kind": kind}))
    quantizer.export(model, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out")
    assert same(state_of(loaded), state_of(model))
    assert divergence(loaded, twin, rows()[32:]) == pytest.approx(record.after, rel=1e-4)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["bits"] == 2 and config["meta"]["gptq_plugin"]["finish"]["kind"] == kind
    told = json.loads((tmp_path / "out/quantization_report.json").read_text())["finish"]
    assert [one["name"] for one in told["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert "model.layers.1, " in (tmp_path / "out/report.html").read_text()
    assert "2 blocks and" in (tmp_path / "out/README.md").read_text()


def test_full_trains_codes_behind_the_blocks_too_from_where_these_left_them(monkeypatch):
    starts, moved, original = [], [], train.Training.__init__

    def noted(self, model, student, *given):
        starts.extend(student.wanted().items())
        moved.extend(name for name, one in student.latent_layers.items() if one.latent.frac().any())
        original(self, model, student, *given)

    monkeypatch.setattr(train.Training, "__init__", noted)
    model, twin, quantizer = quantized()
    record = quantizer.finish(model, twin, rows(), Finish(**{**BLOCKS, "kind": "full", "steps": 24}))
    assert record.kept and record.best_step > 0 and len(record.blocks) == 2
    assert record.after < record.curve[0].held_out * 0.99
    floats, begun = weights_of(twin), dict(starts)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    assert begun.keys() == layers.keys() == set(moved)  # which do not begin at their codes
    for name, layer in layers.items():
        assert not torch.equal(begun[name], floats[name])
        assert not torch.equal(begun[name], layer.dequantize())


def test_inside_temporarily_the_model_teaches_itself_to_the_same_bytes_and_is_float_again_behind_it():
    wanted, twin, quantizer = quantized()
    quantizer.finish(wanted, twin, rows(), Finish(**BLOCKS))
    model = tiny_llama(initializer_range=0.2)
    before = state_of(model)
    quantizer = QuantizeModule(bits=2, group_size=32, nsamples=32)
    with quantizer.temporarily(model, rows()):
        assert quantizer.finish(model, None, rows(), Finish(**BLOCKS)).kept
        assert same(state_of(model), state_of(wanted))
    assert same(state_of(model), before)


def test_a_result_that_is_no_better_leaves_every_byte():
    model, twin, quantizer = quantized(bits=4)
    before = state_of(model)
    rates = {"learning_rate": 0.9, "block_learning_rate": 0.9, "block_code_learning_rate": 0.9}
    record = quantizer.finish(model, twin, rows(), Finish(**{**BLOCKS, **rates}))
    assert not record.kept and "GPTQ's result is best" in record.reason
    assert [one.best_step for one in record.blocks] == [0, 0] and same(state_of(model), before)


@pytest.mark.parametrize(
    ("found", "stays"),
    [
        ([1.0, 2.0, 3.0], "none"), ([1.0, 0.9, 0.95], "blocks"), ([1.0, 2.0, 0.5], "scales"), ([1.0, 0.9, 0.8], "both"),
        ([1.0, float("nan"), float("inf")], "none"),
    ],
)  # fmt: skip
def test_what_the_whole_models_divergence_gets_worse_by_is_undone(found, stays, monkeypatch):
    model, twin, quantizer = quantized()
    before, answers = state_of(model), iter(found)
    monkeypatch.setattr(finish_model._Work, "_judged", lambda self: next(answers))
    record = quantizer.finish(model, twin, rows(), Finish(**{**BLOCKS, "norm_learning_rate": 0}))
    moved = {name.rpartition(".")[2] for name in changed(before, state_of(model))}
    assert (
        moved
        == {"none": set(), "blocks": {"qweight", "scales"}, "scales": {"scales"}, "both": {"qweight", "scales"}}[stays]
    )
    assert record.kept == (stays != "none") and (record.best_step > 0) == (stays in ("scales", "both"))
    assert ("was no better, and was undone" in record.reason) == (stays in ("none", "scales"))
    finite = [one for one in found if one < 10]
    assert record.before == 1.0 and record.after == min(finite)
    quantizer.undo_finish("a limit")
    assert same(state_of(model), before)


@pytest.mark.parametrize("where", ["_learn", "_measure"])
def test_an_error_in_a_later_block_leaves_the_quantized_model_as_it_was(where, monkeypatch):
    model, twin, quantizer = quantized()
    before, original = state_of(model), getattr(block_training.BlockTraining, where)

    def failing(self, *args):
        if (self._block is model.model.layers[1] and self.steps == 3) or (where == "_measure" and self.steps > 3):
            raise MemoryError("a fault")
        return original(self, *args)

    monkeypatch.setattr(block_training.BlockTraining, where, failing)
    with pytest.raises(MemoryError, match="a fault"):
        quantizer.finish(model, twin, rows(), Finish(**BLOCKS))
    assert same(state_of(model), before) and quantizer.report.finish is None
    assert sum(isinstance(one, QuantLinear) for one in model.modules()) == 14


def test_an_error_behind_the_blocks_leaves_the_quantized_model_as_it_was(monkeypatch):
    model, twin, quantizer = quantized()
    before = state_of(model)
    monkeypatch.setattr(train.Training, "_learn", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantizer.finish(model, twin, rows(), Finish(**BLOCKS))
    assert same(state_of(model), before) and quantizer.report.finish is None


def test_a_block_whose_error_rises_at_first_is_trained_to_the_end_unless_patience_is_given():
    rough = {**BLOCKS, "block_code_learning_rate": 0.5, "judgements": 20, "block_steps": 40}
    steps = {}
    for patience in (None, 2):
        model, twin, quantizer = quantized()
        record = quantizer.finish(model, twin, rows(), Finish(**rough, patience=patience))
        steps[patience] = [one.steps for one in record.blocks]
    assert set(steps[None]) == {40} and min(steps[2]) < 40


def test_ctrl_c_in_a_block_keeps_its_best_and_leaves_the_later_ones(monkeypatch):
    original, presses = block_training.BlockTraining._learn, iter([True])

    def interrupted(self, number):
        if self.steps == 10 and next(presses, False):
            signal.raise_signal(signal.SIGINT)
        return original(self, number)

    monkeypatch.setattr(block_training.BlockTraining, "_learn", interrupted)
    model, twin, quantizer = quantized()
    before = state_of(model)
    record = quantizer.finish(model, twin, rows(), Finish(**BLOCKS, patience=9))
    assert [one.steps for one in record.blocks] == [11] and "interrupted in model.layers.0" in record.reason
    assert record.steps == 0 and record.kept == (record.after < record.before)
    assert all(name.startswith("model.layers.0.") for name in changed(before, state_of(model)))


def test_blocks_and_layers_that_stay_float_are_passed_through():
    model = tiny_llama(initializer_range=0.2)
    rules = {r"-:.*layers\.0\.": {}, r"-:.*1\.mlp": {}}
    twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=2, group_size=32, nsamples=32, dynamic=rules)
    quantizer.quantize(model, rows())
    before = state_of(model)
    record = quantizer.finish(model, twin, rows(), Finish(**BLOCKS))
    assert [one.name for one in record.blocks] == ["model.layers.1"] and record.blocks[0].best_step > 0
    assert not any("mlp" in name for name in changed(before, state_of(model)))


def test_a_model_in_bfloat16_is_trained():
    model = tiny_llama(initializer_range=0.2).bfloat16()
    twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=2, group_size=32, nsamples=32)
    quantizer.quantize(model, rows())
    record = quantizer.finish(model, twin, rows(), Finish(**BLOCKS))
    assert record.kept and all(one.after < one.before for one in record.blocks)
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_experts_are_trained_in_their_blocks(monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        vocab_size=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    twin, quantizer = copy.deepcopy(model), QuantizeModule(bits=2, group_size=32, nsamples=32)
    quantizer.quantize(model, rows())
    answers = iter([1.0, 0.9, 0.8])
    monkeypatch.setattr(finish_model._Work, "_judged", lambda self: next(answers))
    begun, original = [], LatentCodes.begin_at
    monkeypatch.setattr(LatentCodes, "begin_at", lambda self, wanted: (begun.append(self), original(self, wanted)))
    before, fused = state_of(model), state_of(twin)
    record = quantizer.finish(model, twin, rows(), Finish(**BLOCKS))
    assert len(record.blocks) == 1 and record.blocks[0].best_step > 0 and len(begun) == 16
    moved = [name for name in changed(before, state_of(model)) if "experts" in name and name.endswith("qweight")]
    assert len(moved) == 12 and same(state_of(twin), fused)


def test_blocks_are_trained_on_the_first_samples_alone(monkeypatch):
    counts, original = [], block_training.BlockTraining.__init__

    def noted(self, block, student, tasks, held_out, *given):
        counts.append((sum(len(task.hidden) for task in tasks), sum(len(task.hidden) for task in held_out.values())))
        original(self, block, student, tasks, held_out, *given)

    monkeypatch.setattr(block_training.BlockTraining, "__init__", noted)
    model, twin, quantizer = quantized()
    few, steps = {**BLOCKS, "block_nsamples": 10, "block_steps": 2, "steps": 2}, []
    quantizer.finish(model, twin, rows(), Finish(**few), progress=lambda *told: steps.append(told))
    assert counts == [(16, 8), (16, 8)]  # in batches of 8
    of_blocks = [done for done, most, text in steps if most == 4 and text.startswith("block error")]
    assert of_blocks == [0, 1, 2, 2, 3, 4]
    counts.clear()
    model, twin, quantizer = quantized()
    monkeypatch.setattr(finish_model, "share_of", lambda nsamples: 0)  # this rank has none of them
    quantizer.finish(model, twin, rows(), Finish(**{**BLOCKS, "block_steps": 2, "steps": 2}))
    assert counts == [(0, 8), (0, 8)]
