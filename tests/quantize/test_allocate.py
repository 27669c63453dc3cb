"""`target_bits`: grids chosen for each layer within a budget, by what the layers do to the model."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.errors import CalibrationError, ExportError, TargetError
from gptq_plugin.quantize import sensitivity

from models import tiny_gpt2, tiny_llama

ROWS = [{"input_ids": torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(n))} for n in range(4)]


def llama(**options):
    """Layers of 64 and 96 inputs that matter unequally."""
    model = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.1, **options)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(4)
        model.model.layers[0].self_attn.v_proj.weight.mul_(3)
    return model


def quantized(model, rows=ROWS, **options):
    quantizer = QuantizeModule(**{"group_size": 32, "target_bits": 3.6, **options})
    return quantizer, quantizer.quantize(model, rows)


@pytest.fixture(scope="module")
def run():
    """A quantized model, its quantizer and its report."""
    model = llama()
    return (model, *quantized(model))


def grids(report):
    return {module.name: (module.bits, module.group_size) for module in report.quantized}


@pytest.mark.parametrize("format_", ["gptq", "compressed-tensors"])
def test_the_average_is_within_the_budget(format_, run):
    """Once with a block in two places, in each of which an export stores it."""
    replicated = llama(num_hidden_layers=3, use_cache=False)
    replicated.model.layers[2] = replicated.model.layers[0]
    report = run[2] if format_ == "gptq" else quantized(replicated, checkpoint_format=format_)[1]
    assert report.weights == sum(unit.weights for unit in report.allocation.units)
    assert 3.5 < report.bits_per_weight == pytest.approx(report.allocation.bits) and report.allocation.bits <= 3.6
    assert len({bits for bits, _ in grids(report).values()}) > 1
    assert not any("target_bits" in line for line in report.deviations)


def test_layers_that_a_client_fuses_are_alike_for_it():
    quantizer = QuantizeModule(group_size=32, target_bits=3.6, checkpoint_format="compressed-tensors")
    found = grids(quantizer.quantize(llama(), ROWS, target="vllm"))
    assert len({bits for bits, _ in found.values()}) > 1
    for block in (0, 1):
        for together in (("q", "k", "v"), ("gate", "up")):
            own = {
                grid for name, grid in found.items() for one in together if f"{block}." in name and f".{one}_" in name
            }
            assert len(own) == 1


def test_the_layers_that_matter_more_get_more_bits(run):
    units = sorted(run[2].allocation.units, key=lambda unit: unit.measured["2"] / unit.weights)
    assert units[0].bits < units[-1].bits
    for unit in units:
        assert list(unit.measured) == ["2", "3", "4"] and unit.measured["2"] > unit.measured["4"] > 0
        if unit.group_size == 32 and str(unit.bits) in unit.measured:
            assert unit.divergence == unit.measured[str(unit.bits)]


def test_more_budget_does_less_damage_and_a_wider_average():
    found = [quantized(llama(), target_bits=bits)[1] for bits in (2.7, 4.4)]
    averages = [report.bits_per_weight for report in found]
    damages = [math.fsum(unit.divergence for unit in report.allocation.units) for report in found]
    assert averages == sorted(averages) and damages == sorted(damages, reverse=True)
    assert all(bits <= report.allocation.target_bits for bits, report in zip(averages, found, strict=True))


def test_the_configuration_of_the_report_gives_the_same_codes_without_measuring(tmp_path):
    first = llama()
    quantizer, report = quantized(first, asymmetric_alpha=0.5)
    assert report.config.target_bits is None and quantizer.config.target_bits == 3.6
    second = llama()
    again = QuantizeModule(report.config).quantize(second, ROWS)
    assert again.allocation is None and grids(again) == grids(report)
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


def test_an_export_has_exact_rules_and_loads_and_its_report_and_card_tell_why(run, tmp_path):
    model, quantizer, report = run
    quantizer.export(model, tmp_path / "late")
    inline = llama()
    QuantizeModule(group_size=32, target_bits=3.6).quantize(inline, ROWS, export_dir=tmp_path / "inline")
    for folder in (tmp_path / "late", tmp_path / "inline"):
        loaded = load_quantized(folder)
        for name, (bits, size) in grids(report).items():
            layer = loaded.get_submodule(name)
            assert isinstance(layer, QuantLinear) and (layer.bits, layer.group_size) == (bits, size)
        stored = json.loads((folder / "quantization_report.json").read_text())
        assert stored["allocation"]["target_bits"] == 3.6 and len(stored["allocation"]["units"]) == 14
        card = (folder / "README.md").read_text()
        assert "## Bits at a budget" in card and "model.layers.1.mlp.down_proj" in card
        assert "Bits at a budget" in (folder / "report.html").read_text()
        described = json.loads((folder / "quantize_config.json").read_text())
        assert described["meta"]["gptq_plugin"]["target_bits"] is None and described["dynamic"]


def test_layers_whose_rule_sets_the_grid_keep_it_and_count():
    rules = {".*down_proj": {"bits": 8}, ".*o_proj": {"sym": False}}
    _, report = quantized(llama(), target_bits=4.4, dynamic=rules)
    found = grids(report)
    assert found["model.layers.0.mlp.down_proj"] == (8, 32)
    assert not any(unit.name.endswith("down_proj") for unit in report.allocation.units)
    assert any(unit.name.endswith("o_proj") for unit in report.allocation.units)
    assert not report.config.for_module("model.layers.0.self_attn.o_proj").sym
    assert report.bits_per_weight <= 4.4


def test_all_experts_of_a_block_get_one_grid():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        vocab_size=128,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    _, report = quantized(AutoModelForCausalLM.from_config(config).eval())
    for block in (0, 1):
        own = {grid for name, grid in grids(report).items() if f"layers.{block}.mlp.experts" in name}
        assert len(own) == 1
    assert {unit.layers for unit in report.allocation.units} == {1, 12}


def test_a_tied_output_embedding_is_chosen_for_too():
    _, report = quantized(llama(tie_word_embeddings=True), lm_head=True)
    assert any(unit.name == "lm_head" and unit.measured["2"] > 0 for unit in report.allocation.units)


@pytest.mark.parametrize("offload", [{"offload_weights": True}, {"offload_activations": True}])
def test_streamed_weights_choose_the_same(offload, run):
    quantizer = QuantizeModule(group_size=32, target_bits=3.6, **offload)
    assert quantizer.quantize(llama(), ROWS).allocation.units == run[2].allocation.units


def test_a_client_gets_grids_that_it_takes_only(tmp_path):
    quantizer = QuantizeModule(group_size=32, target_bits=5.5)
    report = quantizer.quantize(llama(), ROWS, export_dir=tmp_path / "export", target="vllm")
    assert {bits for bits, _ in grids(report).values()} == {4, 8}
    compressed = QuantizeModule(group_size=32, target_bits=3.2, checkpoint_format="compressed-tensors")
    report = compressed.quantize(llama(), ROWS, export_dir=tmp_path / "other", target="vllm")
    assert {bits for bits, _ in grids(report).values()} > {2, 4} - {4}


@pytest.mark.parametrize(
    ("options", "target", "error", "told"),
    [
        ({"target_bits": 2.2}, None, TargetError, ["target_bits=2.2", "2.562 to 8.750", "larger group_size"]),
        ({"target_bits": 9}, None, TargetError, ["target_bits=9", "in between"]),
        ({"dynamic": {"model": {"bits": 3}}}, None, TargetError, ["nothing to choose", "dynamic", "Leave"]),
        ({}, "transformers", ExportError, ["target_bits", "one width", "compressed-tensors"]),
        ({}, "vllm", TargetError, ["target_bits=3.6", "4.625 to 8.750"]),
        ({}, "sglang", ExportError, ["on no grid", "Marlin"]),
        ({"lm_head": True}, "vllm", ExportError, ["lm_head=False"]),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options, target, error, told):
    quantizer = QuantizeModule(**{"group_size": 32, "target_bits": 3.6, **options})
    model = llama()
    with pytest.raises(error) as refused:
        quantizer.check_target(model, target) if target else quantizer.check(model)
    assert all(word in str(refused.value) for word in told), refused.value
    with pytest.raises(error):
        quantizer.quantize(model, iter(()), target=target)  # nothing is read from the data


def test_a_model_without_an_output_embedding_is_refused_before_any_work():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(TargetError, match="Sequential has no output embedding: leave target_bits out"):
        QuantizeModule(target_bits=3.6, group_size=32).check(model)


def test_one_batch_is_refused():
    with pytest.raises(CalibrationError, match="1 batch: give more samples, or a smaller batch_size"):
        quantized(llama(), ROWS[:1])


def test_rounding_to_nearest_takes_the_grids_of_the_last_run_and_is_refused_before_one(run):
    quantizer = QuantizeModule(group_size=32, target_bits=3.6)
    with pytest.raises(ValueError, match="call quantize before round_to_nearest"):
        quantizer.round_to_nearest(llama())
    again = QuantizeModule(group_size=32, target_bits=3.6)
    again.report = run[2]
    assert grids(again.round_to_nearest(llama())) == grids(run[2])


@pytest.mark.parametrize("value", [1.9, 17, "3", True, math.nan])
def test_a_budget_is_a_number_from_2_to_16(value):
    with pytest.raises(ValueError, match="target_bits must be a number from 2 to 16"):
        QuantizeConfig(target_bits=value)


def test_a_layer_that_is_never_called_counts_for_nothing():
    model = tiny_gpt2(initializer_range=0.1)
    model.transformer.h[0].spare = nn.Linear(64, 256)
    _, report = quantized(model)
    assert not any("spare" in unit.name for unit in report.allocation.units)
    assert report.bits_per_weight <= 3.6


def test_on_a_trained_model_a_budget_does_less_than_one_width_of_the_same_size(shared, monkeypatch):
    """Judged on tokens that neither was calibrated on; the attention of pycode-29m's first block."""
    monkeypatch.setattr(sensitivity, "_TRIAL_SAMPLES", 8)
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "pycode-29m", dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:1]
    ids = pycode_rows(shared, 36, 96)
    judged, others = ids[:12], [{"input_ids": rows} for rows in ids[12:].split(4)]
    divergence, bits = {}, {}
    for name, options in {"uniform": {"bits": 3}, "budget": {"target_bits": 3.1484375}}.items():
        one = copy.deepcopy(model)
        options["modules_to_not_convert"] = ["mlp"]
        report = QuantizeModule(group_size=128, nsamples=24, batch_size=4, **options).quantize(one, others)
        bits[name] = report.bits_per_weight
        with torch.no_grad():
            theirs, ours = (each(judged).logits.log_softmax(-1) for each in (model, one))
        divergence[name] = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert 3.12 < bits["budget"] <= 3.1484375 == bits["uniform"]
    assert divergence["budget"] < 0.9 * divergence["uniform"]


def pycode_rows(shared, count, length=128):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "pycode-29m")
    with (shared / "data" / "pycode" / "calib.jsonl").open(encoding="utf-8") as lines:
        text = "".join(json.loads(next(lines))["text"] for _ in range(30))
    return torch.tensor(tokenizer(text)["input_ids"][: count * length]).reshape(count, length)
