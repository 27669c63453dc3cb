"""Quantizing until a result is good enough: which attempt is kept, and what is left when none is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import Finish, QuantizeConfig, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.calibration.forward import call
from gptq_plugin.errors import QualityError
from gptq_plugin.finish.train import Training
from gptq_plugin.quantize import allocate
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.sensitivity import measure_model
from gptq_plugin.training import attempts
from gptq_plugin.training.attempts import Attempts, Quality
from gptq_plugin.training.finish_run import FinishRun
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
    with pytest.raises(QualityError, match="nor is the other one tried. Nothing was exported"):
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


# --- with a finish ---

FINISH = Finish(steps=8, learning_rate=0.02, tokens_per_step=64, held_out=4, judgements=2, batch_size=1)


@pytest.fixture
def finishing(tmp_path):
    """finishing(metrics, ...): the report, the model, and for each export its scales and report's finish."""

    def run(metrics, finish=FINISH, measured=True, norms=None, **gate):
        torch.manual_seed(0)
        model = llama()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 10  # a model whose outputs depend on its weights
        values, exports = iter(metrics), []
        data = [{"input_ids": row[None]} for row in torch.randint(0, 64, (20, 16))]

        def measure():
            if norms is not None:
                norms.append(model.model.norm.weight.detach().clone())
            return {"loss": next(values)}

        attempts = Attempts(
            model,
            data=lambda: data,
            options=PassOptions(partial(call, every_logit=True)),
            quality=Quality(QualityGate({"loss": 0.1}, **gate), {"loss": 1.0}, measure) if measured else Quality(),
            keep=True,
            finish=FinishRun(finish, lambda: data),
        )

        def accept(used, report):
            folder = used.export(model, tmp_path / f"out{len(exports)}")
            exports.append((load_quantized(folder).state_dict(), report.finish, list(report.deviations)))

        quantizer = QuantizeModule(bits=2, group_size=32, nsamples=16, batch_size=4)
        return attempts.quantize(quantizer, accept), model, exports

    return run


def _apart(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_what_gptq_gave_is_exported_before_the_finish_and_the_finished_model_after_it(finishing):
    report, model, [(first, nothing, _), (second, record, _)] = finishing([], measured=False)
    assert nothing is None and record is report.finish and record.kept
    assert {name.rpartition(".")[2] for name in _apart(first, second)} == {"scales", "weight"}
    assert not _apart(second, load_state(model, second))


def load_state(model, like):
    state = model.state_dict()
    return {name: state[name] for name in like}


def test_metrics_are_those_of_the_finished_model(finishing):
    report, _, exports = finishing([1.08, 1.03])
    assert report.metrics == {"loss": {"float": 1.0, "gptq": 1.03}} and len(exports) == 2 and report.finish.kept


def test_a_finish_that_breaks_a_limit_which_held_is_undone(finishing):
    report, model, [(first, *_), (second, record, _)] = finishing([1.05, 1.3])
    assert not record.kept and "loss went from 1 to 1.3" in record.reason and "undone" in record.reason
    assert not _apart(first, second) and not _apart(second, load_state(model, second))
    assert report.metrics == {"loss": {"float": 1.0, "gptq": 1.05}}


def test_a_result_that_is_not_good_enough_is_exported_only_if_the_finish_makes_it_so(finishing):
    report, _, exports = finishing([1.3, 1.05])
    assert len(exports) == 1 and exports[0][1].kept and report.metrics["loss"]["gptq"] == 1.05
    with pytest.raises(QualityError, match="loss went from 1 to 1.2"):
        finishing([1.3, 1.2])


def test_a_result_that_is_accepted_with_a_warning_tells_so_in_both_exports(finishing):
    report, _, exports = finishing([1.3, 1.2], on_fail="warn")
    assert [[one for one in deviations if "loss went" in one] for *_, deviations in exports] == [
        ["loss went from 1 to 1.3 (+0.3, +30.000%; +0.1 allowed)"],
        ["loss went from 1 to 1.2 (+0.2, +20.000%; +0.1 allowed)"],
    ]
    assert len(report.deviations) == len(exports[1][2])


def test_a_finish_that_leads_further_beyond_a_limit_is_undone(finishing):
    report, model, [(first, *_), (second, record, deviations)] = finishing([1.3, 1.5], on_fail="warn")
    assert not record.kept and "loss went from 1 to 1.5" in record.reason and "is nearer" in record.reason
    assert not _apart(first, second) and not _apart(second, load_state(model, second))
    assert report.metrics["loss"]["gptq"] == 1.3
    assert sum("loss went" in one for one in deviations) == 1 == sum("from 1 to 1.3" in one for one in deviations)


def test_every_attempt_is_finished_anew_and_norms_of_the_last_one_do_not_reach_the_next(finishing):
    norms = []
    report, model, exports = finishing([1.3, 1.2, 1.3, 1.05], norms=norms, on_fail="escalate")
    assert len(exports) == 1 and report.finish.kept and any("escalated" in one for one in report.deviations)
    first, finished, second, last = norms
    assert torch.equal(first, second) and not torch.equal(first, finished) and not torch.equal(second, last)
    assert torch.equal(last, model.model.norm.weight)


def test_a_finish_that_fails_raises_and_leaves_the_export_of_gptq(finishing, monkeypatch, tmp_path, caplog):
    def failing(*_):
        raise MemoryError("a fault")

    monkeypatch.setattr(Training, "_step", failing)
    with pytest.raises(MemoryError, match="a fault"):
        finishing([1.05])
    assert "the finish failed; what GPTQ gave is exported" in caplog.text
    assert len(_quantized(load_quantized(tmp_path / "out0"))) == 7 and not (tmp_path / "out1").exists()
