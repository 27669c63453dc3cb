"""The float model walks beside the quantized one: layers make up for the drift of their inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from plans import Attention, Listed, calibration_of, plan_of, rows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeModule
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.gptq.solve_each import solve_each
from gptq_plugin.quantize import solve_experts
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.one_pass import OnePass
from gptq_plugin.quantize.options import PassOptions

from models import tiny_gpt2, tiny_llama

CONFIG = QuantizeConfig(bits=2, group_size=16, nsamples=1000, batch_size=2, asymmetric_alpha=0.5)


def passed(model, batches, config=CONFIG, **options):
    with torch.no_grad():
        return OnePass(plan_of(model, config), calibration_of(batches, config), PassOptions(**options)).run()


def chain(width=32, layers=3):
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*parts)


def inputs_of(model, name, batches):
    """The inputs of a layer in plain forwards."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return torch.cat(seen)


def with_layers(model, layers):
    model = copy.deepcopy(model)
    for name, layer in layers.items():
        model.get_submodule(name).weight.data = layer.dequantize()
    return model


def test_a_layers_drift_is_that_of_its_input_between_the_float_and_the_quantized_model(solved):
    model, batches = chain(), [rows(60, 32, seed) for seed in range(3)]
    layers, _ = passed(model, batches)
    quantized = with_layers(model, layers)
    assert len(solved) == 3 and not solved[0][2].any()  # nothing before it is quantized
    for (_, hessian, drift), name in zip(solved, ("0", "2", "4"), strict=True):
        x, seen = inputs_of(model, name, batches), inputs_of(quantized, name, batches)
        torch.testing.assert_close(hessian, seen.T @ seen / 180, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(drift, (x - seen).T @ seen / 180, rtol=1e-3, atol=1e-6)
    assert solved[2][2].abs().max() > 1e-3


def test_a_layer_of_few_outputs_gets_the_drift_of_its_float_outputs(solved):
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), [rows(60, 32, n) for n in range(3)]
    layers, _ = passed(model, batches)
    x, seen = (inputs_of(one, "2", batches) for one in (model, with_layers(model, layers)))
    wanted = model[2].weight.detach() @ ((x - seen).T @ seen / 180)
    torch.testing.assert_close(solved[1][2], wanted, rtol=1e-3, atol=1e-6)


class Siblings(nn.Module):
    """Two layers of few outputs read one input, which is overwritten behind them."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.other = nn.Linear(32, 64), nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        y = self.one(x) + self.other(x)
        x.zero_()
        return y


def test_layers_that_read_one_input_get_its_drift_however_few_their_outputs_are(solved):
    torch.manual_seed(0)
    model, batches = Siblings(), [rows(60, 32, n) for n in range(3)]
    first = copy.deepcopy(model.first)
    layers, _ = passed(model, batches)
    with torch.no_grad():
        x, seen = (torch.tanh(one(torch.cat(batches))) for one in (first, layers["first"]))
    assert [shape for shape, _, _ in solved] == [(64, 32), (32, 64)]
    torch.testing.assert_close(solved[1][2], (x - seen).T @ seen / 180, rtol=1e-2, atol=1e-5)


def codes_of(model, batches, config=CONFIG, **options):
    quantizer = QuantizeModule(config, **options)
    report = quantizer.quantize(model, batches)
    return {k: v for k, v in model.state_dict().items() if "qweight" in k or "scales" in k}, report


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("order", [{}, {"desc_act": True, "static_groups": False}], ids=str)
def test_the_codes_are_the_same_in_every_mode_of_memory_and_one_batch_at_a_time(make, order, monkeypatch):
    batches = [torch.randint(4, 128, (2, 40), generator=torch.Generator().manual_seed(n)) for n in range(5)]
    batches = [{"input_ids": ids} for ids in batches]
    config = QuantizeConfig(bits=3, group_size=16, nsamples=10, asymmetric_alpha=0.5, **order)
    usual, report = codes_of(make(), batches, config)
    without, _ = codes_of(make(), batches, QuantizeConfig(bits=3, group_size=16, nsamples=10, **order))
    assert any(not torch.equal(usual[name], without[name]) for name in usual)
    first = next(iter(usual))
    assert torch.equal(usual[first], without[first])
    for options in ({"offload_weights": True}, {"offload_activations": True}, {"exact_sums": True}):
        found, other = codes_of(make(), batches, config, **options)
        assert all(torch.equal(found[name], usual[name]) for name in usual), options
        assert [one.loss for one in other.modules] == [one.loss for one in report.modules]
    monkeypatch.setattr(BatchRuns, "disturbance", lambda self, layers: "asked for")
    found, other = codes_of(make(), batches, config)
    assert all(torch.equal(found[name], usual[name]) for name in usual)
    assert [one.tokens for one in other.modules] == [one.tokens for one in report.modules]


def test_padding_is_left_out_of_the_drift_as_of_the_hessian(solved):
    model = tiny_llama(num_hidden_layers=1)
    ids = torch.randint(4, 128, (3, 60), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(60) < torch.tensor([[60], [37], [8]])).long()
    batches = [{"input_ids": ids, "attention_mask": mask}]
    layers, report = passed(model, batches, QuantizeConfig(bits=2, group_size=16, nsamples=3, asymmetric_alpha=1.0))
    name, kept = "model.layers.0.mlp.down_proj", mask.flatten().bool()
    x, seen = (inputs_of(one, name, batches)[kept] for one in (model, with_layers(model, layers)))
    assert {one.tokens for one in report.modules if one.method == "gptq"} == {105}
    torch.testing.assert_close(solved[-1][1], seen.T @ seen / 105, rtol=1e-4, atol=1e-7)
    drift = (x - seen).T @ seen / 105
    if solved[-1][2].shape != drift.shape:
        drift = model.get_submodule(name).weight.detach() @ drift
    torch.testing.assert_close(solved[-1][2], drift, rtol=1e-2, atol=1e-6)


def test_the_ranges_in_the_report_are_those_of_the_quantized_model():
    model, batches = chain(layers=2), [rows(60, 32)]
    layers, report = passed(model, batches)
    quantized = with_layers(model, layers)
    seen = inputs_of(quantized, "2", batches)
    last = next(one for one in report.modules if one.name == "2")
    assert last.max_input == pytest.approx(float(seen.abs().max()))
    with torch.no_grad():
        assert last.max_output == pytest.approx(float(quantized[2](seen).abs().max()), rel=1e-5)


class Recurring(nn.Module):
    """One layer called twice in a forward, on its own output."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.twice(x)))


def test_calls_are_paired_one_by_one(solved):
    torch.manual_seed(0)
    model, batches = Recurring(), [rows(60, 32, seed) for seed in range(2)]
    layers, report = passed(model, batches)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    other.first.weight.data = layers["first"].dequantize()  # the layer itself is float in both its calls
    x, seen = inputs_of(one, "twice", batches), inputs_of(other, "twice", batches)
    assert [len(x), len(seen)] == [240, 240]
    torch.testing.assert_close(solved[1][2], (x - seen).T @ seen / 240, rtol=1e-3, atol=1e-6)
    assert not any("calls came after" in deviation for deviation in report.deviations)


class Branching(nn.Module):
    """Goes through one layer where its first computes what it did at first, else through another."""

    def __init__(self, x):
        super().__init__()
        self.first, self.small, self.large, self.next, self.last = (nn.Linear(32, 32) for _ in range(5))
        self.expected = self.first(x).detach()

    def forward(self, x):
        x = self.first(x)
        same = x.shape == self.expected.shape and torch.allclose(x, self.expected, atol=1e-4)
        return self.last(torch.tanh(self.next(torch.tanh((self.small if same else self.large)(torch.tanh(x))))))


def test_layers_that_one_walk_alone_reaches_are_as_if_there_were_no_other(solved):
    torch.manual_seed(0)
    x = rows(60, 32)
    model = Branching(x)
    layers, report = passed(model, [x])
    of = {one.name: one for one in report.modules}
    assert of["small"].method == "float" and "small" not in layers  # only the float model came there
    assert of["large"].tokens == 60 and of["large"].deviations == (
        "60 of 60 tokens have no counterpart in the float model: taken as not drifted",
    )
    assert of["next"].tokens == of["last"].tokens == 60
    # The float forward, which waited at a layer of its own, has come along; what it went through is another model.
    assert of["last"].deviations == (
        "asymmetric_alpha is not applied: its inputs have little to do with the float model's",
    )


def test_an_experts_rows_are_paired_with_what_the_float_model_gives_its_block_for_the_same_tokens(solved):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), Listed(), nn.Linear(32, 32))
    batches = [rows(200, 32, seed) for seed in range(2)]
    layers, report = passed(model, batches)
    quantized = with_layers(model, layers)
    x, seen = (inputs_of(one, "1", batches) for one in (model, quantized))
    chosen = quantized[1].gate(seen)[:, :-1].argmax(-1)
    assert (chosen != model[1].gate(x)[:, :-1].argmax(-1)).any()  # the float model chooses others for some
    of_experts = [drift for shape, _, drift in solved if shape == (64, 32)]
    assert len(of_experts) == 4 and of_experts[3] is None  # no token reached the last
    for expert, drift in enumerate(of_experts[:3]):
        mine = chosen == expert
        wanted = (x - seen)[mine].T @ seen[mine] / (int(mine.sum()) + 32)  # as many tokens as the Hessian has
        torch.testing.assert_close(drift, wanted, rtol=1e-2, atol=1e-5)
    assert all(drift is None for shape, _, drift in solved if shape == (32, 64))
    x, seen = inputs_of(model, "2", batches), inputs_of(quantized, "2", batches)
    torch.testing.assert_close(solved[-1][2], (x - seen).T @ seen / 400, rtol=1e-2, atol=1e-4)
    told = "asymmetric_alpha is not applied: the expert gets other tokens in the float model"
    for one in report.modules:
        assert (told in one.deviations) == (one.name.endswith(".2") and one.tokens > 0), one.name
        assert not any("no counterpart" in deviation for deviation in one.deviations)
    assert not any("calls came after" in deviation for deviation in report.deviations)


def test_experts_of_one_parameter_and_padded_batches_are_paired_too(monkeypatch):
    drifts = []

    def noted(weights, hessians, config, damp_percents, drift=None):
        drifts.append(drift if drift is None else drift.clone())
        return solve_each(weights, hessians, config, damp_percents, drift)

    monkeypatch.setattr(solve_experts, "solve_each", noted)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    mask = (torch.arange(40) < torch.tensor([[40], [25], [33]])).long()
    batches = [{"input_ids": torch.randint(0, 64, (3, 40)), "attention_mask": mask} for _ in range(3)]
    report = QuantizeModule(bits=2, group_size=32, nsamples=9, asymmetric_alpha=0.5).quantize(model, batches)
    first = [one for one in report.modules if one.name.endswith((".gate_proj", ".up_proj"))]
    assert len(first) == 16 and sum(one.tokens for one in first if "layers.0" in one.name) == 2 * 2 * 3 * 98
    assert not any("no counterpart" in deviation for one in report.modules for deviation in one.deviations)
    assert [drift is None for drift in drifts] == [False, True, False, True]
    assert all(len(drift) == 4 and drift.flatten(1).any(1).all() for drift in drifts[::2])


def test_a_rule_asks_for_it_for_some_layers_only(solved):
    config = QuantizeConfig(bits=2, group_size=16, nsamples=1000, dynamic={"4": {"asymmetric_alpha": 0.5}})
    passed(chain(), [rows(60, 32)], config)
    assert [drift is None for _, _, drift in solved] == [True, True, False] and solved[2][2].any()


def test_the_model_is_float_afterwards_whatever_happens():
    model = Attention()
    before = dict(model.named_parameters())

    def fail(done, total, names):
        if done == 4:
            raise KeyError("progress")

    with pytest.raises(KeyError, match="progress"):
        passed(model, [rows(100, 32)], progress=fail)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_inputs_that_are_of_other_tokens_in_the_float_model_are_told_and_left_alone(solved):
    """A layer behind another that sorts the tokens by what it computed of them, as it gets them."""

    class Sorting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.score, self.last = (nn.Linear(32, 32, bias=False) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            return self.last(x[self.score(x)[:, 0].mul(1e4).frac().argsort()])

    torch.manual_seed(0)
    _, report = passed(Sorting(), [rows(200, 32)])
    of = {one.name: one for one in report.modules}
    told = ("asymmetric_alpha is not applied: its inputs have little to do with the float model's",)
    assert of["last"].deviations == told and of["score"].deviations == ()
    assert solved[1][2] is not None and solved[2][2] is None
