"""What is tried when a quantized model is not good enough, in which order, and until when."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear
from gptq_plugin.checkpoint.description import client_config
from gptq_plugin.model.plan import Plan, planned
from gptq_plugin.model.structure import Structure
from gptq_plugin.training.escalation import Ranking
from gptq_plugin.training.escalation import steps as steps_of

from lightning_runs import llama


def layers(*inputs: int, out: int = 32) -> nn.Module:
    """Linear layers named a, b, c, ... with so many inputs each."""
    return nn.ModuleDict({name: nn.Linear(count, out) for name, count in zip("abcdefgh", inputs)})


def grids(model: nn.Module, config: QuantizeConfig) -> dict[str, tuple[int, int]]:
    return {target.name: (target.config.bits, target.config.group_size) for target in plan_of(model, config).targets}


def plan_of(model: nn.Module, config: QuantizeConfig) -> Plan:
    with planned(model, config) as plan:
        return plan


def steps(plan, ranks, remark=""):
    """The steps of a plan whose quantized layers have these ranks."""
    return steps_of(plan, ranks, lambda: Ranking(ranks, remark))


def seen(model, config, noise, most=100.0):
    """(grids, bits) of each step."""
    return [
        (grids(model, step.config), step.bits) for step in steps(plan_of(model, config), noise) if step.bits <= most
    ]


def test_at_every_width_the_whole_model_gets_smaller_groups_and_then_the_noisiest_layers_more_bits():
    model, config = layers(256, 256, 256, 256), QuantizeConfig(bits=3)
    noise = {"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}
    found = seen(model, config, noise, most=4.7)
    assert [grid for grid, _ in found] == [
        dict.fromkeys("abcd", (3, 64)),
        dict.fromkeys("abcd", (3, 32)),
        {"a": (3, 128), "b": (4, 128), "c": (3, 128), "d": (3, 128)},
        {"a": (3, 128), "b": (4, 128), "c": (4, 128), "d": (3, 128)},
        dict.fromkeys("abcd", (4, 128)),
        dict.fromkeys("abcd", (4, 64)),
        dict.fromkeys("abcd", (4, 32)),
    ]
    three, four = 3 + 19 / 128, 4 + 20 / 128
    expected = [3 + 19 / 64, 3 + 19 / 32, (3 * three + four) / 4, (three + four) / 2, four, 4 + 20 / 64, 4 + 20 / 32]
    assert [bits for _, bits in found] == pytest.approx(expected)


def test_a_step_describes_what_it_changes():
    model, config = layers(256, 256, 256, 256), QuantizeConfig(bits=4)
    said = [step.what for step in steps(plan_of(model, config), {"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2})]
    assert said[0] == "groups of 64 or less in all layers, 4.31 bits per weight (scales and zeros included, g_idx not)"
    assert said[2] == "more bits for 1 of 4 layers (b), 5.16 bits per weight (scales and zeros included, g_idx not)"
    assert said[-1].startswith("more bits for 4 of 4 layers (b, c, d, a) and groups of 32 or less in all layers, 8.75")


def test_large_layers_count_for_more_in_the_average():
    model = layers(64, 192)
    (_, bits), *_ = [s for s in seen(model, QuantizeConfig(group_size=64), {"a": 1.0, "b": 0.5}) if s[0]["a"][0] == 8]
    assert bits == pytest.approx((8 + 24 / 64) / 4 + (4 + 20 / 64) * 3 / 4)


def test_a_steps_bits_per_weight_are_those_of_its_report():
    """`tests/report/test_report.py` has the report's beside the bytes of the files."""
    for options in ({"bits": 3}, {"bits": 3, "sym": False}, {"bits": 3, "checkpoint_format": "compressed-tensors"}):
        model, config = layers(256, 64, out=96), QuantizeConfig(group_size=64, **options)
        for step in steps(plan_of(model, config), {"a": 0.2, "b": 0.1}):
            report = QuantizeModule(step.config).round_to_nearest(layers(256, 64, out=96))
            assert step.bits == report.bits_per_weight and f", {step.bits:.2f} bits per weight" in step.what


def test_groups_that_do_not_divide_every_layer_are_not_tried():
    noise = {"a": 0.1, "b": 0.2}
    assert [{size for _, size in grid.values()} for grid, _ in seen(layers(576, 192), QuantizeConfig(
        bits=8, group_size=-1), noise)] == [{64}, {32}]  # fmt: skip
    assert not seen(layers(576, 80), QuantizeConfig(bits=8, group_size=-1), noise)
    assert not seen(layers(576, 192), QuantizeConfig(bits=8, group_size=16), noise)


def test_a_layers_own_rules_are_kept_and_its_smaller_groups_too():
    model = layers(128, 128, 128)
    config = QuantizeConfig(bits=3, dynamic={"[b]$": {"group_size": 32, "bits": 4, "sym": False}, "c$": {"sym": False}})
    found = list(steps(plan_of(model, config), {"a": 0.1, "b": 0.4, "c": 0.3}))
    assert [grids(model, step.config)["b"][0] for step in found][:4] == [4, 4, 8, 8]  # groups of 64, of 32, then b
    for step in found:
        assert grids(model, step.config)["b"][1] == 32
        assert not step.config.for_module("b").sym and not step.config.for_module("c").sym
        assert step.config.for_module("a").sym


def test_one_grid_for_all_layers_needs_no_rules_so_that_every_client_reads_it(rtn):
    model = llama()
    names = [target.name for target in plan_of(model, QuantizeConfig(group_size=32)).targets]
    every = list(steps(plan_of(model, QuantizeConfig(bits=3, group_size=-1)), dict.fromkeys(names, 0.1)))
    uniform = [step for step in every if len(set(grids(model, step.config).values())) == 1]
    assert [grids(model, step.config)[names[0]] for step in uniform] == [(3, 32), (4, -1), (4, 32), (8, -1), (8, 32)]
    for step in uniform[:3]:
        quantized = rtn(llama(), step.config)
        described = client_config(Structure.of(quantized), dict(_quantized(quantized)), step.config)
        assert not any(rule for rule in described.get("dynamic", {}).values())
        assert (described["bits"], described["group_size"]) == grids(model, step.config)[names[0]]


def _quantized(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]


def test_a_layer_skips_the_widths_it_cannot_be_packed_at():
    model = nn.ModuleDict({"a": nn.Linear(64, 48), "b": nn.Linear(64, 64)})  # 48 rows of 3 bits fill no whole words
    found = seen(model, QuantizeConfig(bits=2, group_size=32), {"a": 0.2, "b": 0.1})
    assert [grid["a"][0] for grid, _ in found] == [4, 4, 8, 8, 8] and all(set(grid) == {"a", "b"} for grid, _ in found)
    assert [grid["b"][0] for grid, _ in found] == [2, 3, 3, 4, 8]


def test_layers_that_were_left_float_stay_so():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(100, 72)})  # b is not packed at 3 bits, but at 8
    config = QuantizeConfig(bits=3, group_size=32)
    assert all(set(grids(model, step.config)) == {"a"} for step in steps(plan_of(model, config), {"a": 0.1}))


def test_experts_of_one_parameter_get_more_bits_together():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    quantize = QuantizeConfig(bits=3, group_size=32)
    noise = {target.name: 1.0 + ("experts.1.w1" in target.name) for target in plan_of(model, quantize).targets}
    noise["model.layers.0.self_attn.q_proj"] = 1.5  # more than the mean of any parameter's experts
    asked, raised = [], []
    for step in steps_of(plan_of(model, quantize), noise, lambda: (asked.append(0), Ranking(noise))[1]):
        given = {target.name: target.config.bits for target in plan_of(model, step.config).targets}
        for layer in (0, 1):
            for parts in (("w1", "w3"), ("w2",)):
                experts = [f"model.layers.{layer}.mlp.experts.{e}.{part}" for e in range(3) for part in parts]
                assert len({given[name] for name in experts}) == 1
        raised += [{name for name, bits in given.items() if bits > 3}]
    assert set(given.values()) == {8} and len(asked) == 1
    assert "model.layers.0.self_attn.q_proj" in next(filter(None, raised))
