"""Quantizing until a result is good enough: which attempt is kept, and what is left when none is."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.calibration.forward import call
from gptq_plugin.errors import QualityError
from gptq_plugin.quantize import allocate
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.sensitivity import measure_model
from gptq_plugin.training import attempts
from gptq_plugin.training.attempts import Attempts, Quality
from gptq_plugin.training.quality_gate import QualityGate

from lightning_runs import llama


def _quantized(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]


@pytest.fixture
def loop(tmp_path):
    """loop(metrics, ...): the report, with the metric of each attempt given; and the model."""
    ids = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(0))

    def quantize(metrics, quantizer=None, model=None, **gate):
        model = llama() if model is None else model
        quantizer = quantizer or QuantizeModule(group_size=-1, nsamples=16, batch_size=4)
        values = iter(metrics)
        finished = []
        several = Attempts(
            model,
            data=lambda: [{"input_ids": row[None]} for row in ids],
            options=PassOptions(call),
            quality=Quality(QualityGate({"loss": 0.1}, **gate), {"loss": 1.0}, lambda: {"loss": next(values)}),
            keep=True,
        )
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        report = several.quantize(quantizer, lambda used, report: finished.append(used.export(model, folder)))
        assert next(values, None) is None and len(finished) == 1
        return report, model, finished[0]

    return quantize


def test_the_first_attempt_that_is_good_enough_is_kept_and_its_report_tells_of_the_others(loop, caplog):
    report, model, folder = loop([1.3, 1.2, 1.05], on_fail="escalate")
    groups, bits = report.deviations
    assert groups.startswith("escalated, groups of 32 or less in all layers, ") and "loss went from 1 to 1.3" in groups
    assert bits.startswith("escalated, more bits for 1 of 7 layers (") and "loss went from 1 to 1.2" in bits
    assert groups in caplog.text and bits in caplog.text
    assert report.metrics == {"loss": {"float": 1.0, "gptq": 1.05}}
    raised = [module.name for module in report.quantized if module.bits == 8]
    assert len(raised) == 1 and f"({raised[0]})" in bits
    assert {name: layer.bits for name, layer in _quantized(model)} == {m.name: m.bits for m in report.quantized}
    loaded = load_quantized(folder)
    assert loaded.get_submodule(raised[0]).bits == 8 and len(_quantized(loaded)) == 7


def test_the_layers_that_get_more_bits_do_most_to_the_model_on_tokens_that_they_are_not_calibrated_on(loop):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(30)
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e-3)
    rows = [
        {"input_ids": row[None]} for row in torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(0))
    ]
    quantizer = QuantizeModule(group_size=-1, nsamples=16, batch_size=4)
    alone = measure_model(model, rows, quantizer.config, PassOptions(call))
    most = max(alone, key=alone.__getitem__)
    report, _, _ = loop([1.3, 1.2, 1.05], model=model, on_fail="escalate")
    assert [module.name for module in report.quantized if module.bits == 8] == [most]
    assert report.deviations[1].startswith(f"escalated, more bits for 1 of 7 layers ({most}), ")


def test_nothing_is_measured_before_layers_are_to_get_more_bits(loop, monkeypatch):
    monkeypatch.setattr(attempts, "measure_model", lambda *given: pytest.fail("measured"))
    loop([1.3, 1.05], on_fail="escalate")  # in smaller groups


def test_where_layers_cannot_be_measured_their_outputs_decide_and_that_is_reported(loop):
    quantizer = QuantizeModule(group_size=-1, nsamples=16, batch_size=16)
    report, _, _ = loop([1.3, 1.2, 1.05], quantizer, on_fail="escalate")
    assert "; by their outputs' errors on calibration tokens: " in report.deviations[1]
    assert "and there is 1 batch" in report.deviations[1]


def test_a_budget_that_is_not_good_enough_is_followed_by_larger_ones_divided_by_the_same_measurements(
    loop, monkeypatch
):
    measured = []
    original = allocate.measure_sensitivities
    monkeypatch.setattr(allocate, "measure_sensitivities", lambda *given: measured.append(1) or original(*given))
    quantizer = QuantizeModule(target_bits=4.1, group_size=32, nsamples=16, batch_size=4)
    report, model, folder = loop([1.3, 1.2, 1.05], quantizer, on_fail="escalate")
    assert len(measured) == 1
    first, second = report.deviations
    assert first.startswith("escalated, a budget of 4.35 bits per weight, ") and "loss went from 1 to 1.3" in first
    assert second.startswith("escalated, a budget of 4.6 bits per weight, ")
    assert 4.1 < report.bits_per_weight <= 4.6
    assert {n: layer.bits for n, layer in _quantized(load_quantized(folder))} == {
        m.name: m.bits for m in report.quantized
    }


def test_budgets_above_the_limit_of_bits_are_not_tried(loop):
    quantizer = QuantizeModule(target_bits=4.1, group_size=32, nsamples=16, batch_size=4)
    with pytest.raises(QualityError, match="there is nothing else to try within max_bits=4.2"):
        loop([1.3], quantizer, on_fail="escalate", max_bits=4.2)


def test_smaller_groups_alone_leave_an_export_with_one_grid(loop):
    report, model, folder = loop([1.3, 1.05], on_fail="escalate", max_bits=4.625)
    assert report.config == QuantizeConfig(group_size=32, nsamples=16, batch_size=4)
    assert {layer.group_size for _, layer in _quantized(load_quantized(folder))} == {32}
    assert len(report.deviations) == 1


def test_steps_above_the_limit_of_bits_are_left_out_and_cheaper_ones_after_them_tried(loop):
    quantizer = QuantizeModule(bits=3, group_size=-1, nsamples=16, batch_size=4)
    report, _, _ = loop([1.3, 1.05], quantizer, on_fail="escalate", max_bits=3.59)  # in groups of 32 it is 3.594
    assert {m.group_size for m in report.quantized} == {-1} and {m.bits for m in report.quantized} == {3, 4}


def test_a_metric_that_is_gone_or_not_a_number_is_not_good_enough(loop):
    with pytest.raises(QualityError, match="loss went from 1 to nan.*on_fail='escalate'"):
        loop([float("nan")])
    with pytest.raises(QualityError, match="nothing else to try within max_bits=4"):
        loop([float("nan")], on_fail="escalate", max_bits=4)
    assert QualityGate({"loss": 0.1}).failures({"loss": 1.0}, {})


def test_every_step_is_tried_before_it_is_given_up(loop):
    model = llama()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quantizer = QuantizeModule(bits=8, group_size=-1, nsamples=16, batch_size=4)
    with pytest.raises(QualityError, match="nor is any of the 1 others tried. Nothing was exported"):
        loop([2.0, 2.0], quantizer, model, on_fail="escalate")
    assert _quantized(model) == [] and all(
        torch.equal(state[name], value) for name, value in model.state_dict().items()
    )


def test_a_quantizer_of_the_users_own_kind_is_used_for_every_attempt_and_keeps_its_configuration(loop):
    used = []

    class Own(QuantizeModule):
        def temporarily(self, *args, **options):
            used.append(self.config)
            return super().temporarily(*args, **options)

    config = QuantizeConfig(group_size=-1, nsamples=16, batch_size=4)
    own = Own(config, offload_activations=False)
    report, _, _ = loop([1.3, 1.0], quantizer=own, on_fail="escalate")
    assert used[0] == own.config == config and used[-1] == report.config != config


def test_experts_left_float_are_in_one_parameter_again_when_the_result_is_exported(loop):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "head_dim": 32, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2,
             "vocab_size": 64}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes))
    quantizer = QuantizeModule(group_size=32, nsamples=16, batch_size=4, modules_to_not_convert=["experts"])
    _, _, folder = loop([1.0], quantizer, model)
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(load_quantized(folder).model.layers[0].mlp.experts.down_proj, experts.down_proj)
