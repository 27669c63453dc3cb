"""What single layers do to a model: measured on held-out batches, at positions that count."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig
from gptq_plugin.allocation.units import parameter_name, units_of
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.model.plan import planned
from gptq_plugin.quantize import divergence, sensitivity
from gptq_plugin.quantize.one_pass import OnePass
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.sensitivity import divided, measure_layers, measure_sensitivities

from models import tiny_llama

CONFIG = QuantizeConfig(group_size=32, target_bits=3.6, nsamples=100, model_seqlen=40, batch_size=2)


def capped():
    """A model that caps the logits of its output embedding."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, final_logit_softcapping=1.0, initializer_range=0.3,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


class Wrapped(nn.Module):
    """Returns only the loss of the model inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits.sum()


def padded(batches=6, seed=0):
    """Batches whose rows end in padding of arbitrary tokens."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        lengths = torch.randint(20, 40, (2, 1), generator=draw)
        mask = (torch.arange(40) < lengths).long()
        found.append({"input_ids": torch.randint(0, 128, (2, 40), generator=draw), "attention_mask": mask})
    return found


def measured(model, rows, config=CONFIG, options=None):
    with planned(model, config) as plan, evaluating(model):
        calibration = collect(rows, config, alone=True)
        return measure_sensitivities(plan, units_of(plan, None), calibration, options or PassOptions()), calibration


@pytest.mark.parametrize("make", [lambda: tiny_llama(initializer_range=0.2), capped])
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped])
def test_it_is_the_divergence_of_the_outputs_with_the_layers_of_a_trial_alone(make, wrap, monkeypatch):
    monkeypatch.setattr(sensitivity, "_WIDTHS", (2,))
    rows, network = padded(), make()
    model = wrap(network)
    found, calibration = measured(model, rows)
    held_out, others = divided(calibration)
    with planned(model, dataclasses.replace(CONFIG, bits=2, target_bits=None)) as plan, evaluating(model):
        layers, _ = OnePass(plan, others, PassOptions()).run()
        units = units_of(plan, None)
    for unit in (units[0], units[-1]):
        altered = copy.deepcopy(model)
        altered.get_submodule(unit.name).weight.data = layers[unit.name].dequantize()
        inner = altered.inner if wrap is Wrapped else altered
        total = count = 0
        with torch.no_grad():
            for batch in held_out.batches:
                kept = batch.data["attention_mask"].bool()
                before, after = (one(**batch.data).logits[kept].log_softmax(-1) for one in (network, inner))
                total += (before.exp() * (before - after)).sum().item()
                count += int(kept.sum())
        assert found.tokens == count
        assert found.measured[unit.name] == {2: pytest.approx(total / count, rel=1e-4)} and total > 0


def test_a_layer_is_measured_on_the_grid_it_has_for_each_of_its_weights():
    model, rows = tiny_llama(initializer_range=0.2), padded()
    config = dataclasses.replace(CONFIG, bits=3, target_bits=None, dynamic={".*up_proj": {"bits": 2}})
    with planned(model, config) as plan, evaluating(model):
        calibration = collect(rows, config, alone=True)
        found = measure_layers(plan, calibration, PassOptions())
        names = {target.name: target for target in plan.targets}
        assert set(found) == set(names)
        held_out, others = divided(calibration)
        trials = {
            bits: OnePass(plan.with_config(dataclasses.replace(config, bits=bits)), others, PassOptions()).run()[0]
            for bits in (2, 3)
        }
    for name, bits in (("model.layers.0.mlp.up_proj", 2), ("model.layers.0.self_attn.q_proj", 3)):
        altered = copy.deepcopy(model)
        altered.get_submodule(name).weight.data = trials[bits][name].dequantize()
        total = count = 0
        with torch.no_grad():
            for batch in held_out.batches:
                kept = batch.data["attention_mask"].bool()
                before, after = (one(**batch.data).logits[kept].log_softmax(-1) for one in (model, altered))
                total += (before.exp() * (before - after)).sum().item()
                count += int(kept.sum())
        assert found[name] == pytest.approx(total / count / names[name].weight.numel(), rel=1e-4) and total > 0


def test_experts_of_one_parameter_have_one_value():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes)).eval()
    config = QuantizeConfig(bits=3, group_size=32)
    rows = [{"input_ids": torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(n))} for n in range(4)]
    with planned(model, config) as plan, evaluating(model):
        found = measure_layers(plan, collect(rows, config, alone=True), PassOptions())
        parameters = defaultdict(set)
        for target in plan.targets:
            parameters[parameter_name(target)].add(found[target.name])
    assert all(len(values) == 1 for values in parameters.values()) and len(parameters) < len(found)


def test_layers_of_a_model_without_logits_are_not_measured():
    model, config = nn.Sequential(nn.Linear(32, 32)), QuantizeConfig(group_size=32)
    with planned(model, config) as plan, pytest.raises(TargetError, match="Sequential has no output embedding"):
        measure_layers(plan, collect([torch.randn(4, 32)] * 2, config, alone=True), PassOptions())


def test_of_more_logits_than_are_kept_evenly_spaced_ones_are_compared(monkeypatch):
    monkeypatch.setattr(sensitivity, "_WIDTHS", (2,))
    whole, calibration = measured(tiny_llama(initializer_range=0.2), padded(4))
    monkeypatch.setattr(divergence, "_KEPT_BYTES", 20 * 128 * 4)  # of 20 positions
    part, _ = measured(tiny_llama(initializer_range=0.2), padded(4))
    assert 10 < part.tokens <= 20 < whole.tokens
    for name, of_unit in part.measured.items():
        assert of_unit[2] == pytest.approx(whole.measured[name][2], rel=1)


def test_the_model_is_as_it_was(monkeypatch):
    monkeypatch.setattr(sensitivity, "_WIDTHS", (3,))
    model = tiny_llama().train()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    measured(model, padded(4))
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_grids_that_were_not_measured_are_scaled_from_those_that_were(monkeypatch):
    monkeypatch.setattr(sensitivity, "_WIDTHS", (4,))
    found, _ = measured(tiny_llama(initializer_range=0.2), padded(4), dataclasses.replace(CONFIG, group_size=64))
    for name, damages in found.damages.items():
        ordered = [damages[grid] for grid in sorted(damages) if grid.group_size == 32]
        assert ordered == sorted(ordered, reverse=True)
        assert all(
            damages[grid] == found.measured[name][4] for grid in damages if (grid.bits, grid.group_size) == (4, 64)
        )


@pytest.mark.parametrize(
    ("measured", "floor"),
    [
        ([(4.0, 0.5), (2.0, 0.3), (1.0, 0.2)], 0.1),  # 0.1 beside 0.1 for each unit of error
        ([(2.0, 0.3), (1.0, 0.1)], 0.0),  # more than proportional
        ([(2.0, 0.1), (1.0, 0.2)], 0.2),  # noise: no more than what was measured
        ([(1.0, 0.2)], 0.0),
        ([(0.0, 0.0), (0.0, 0.0)], 0.0),
    ],
)
def test_what_the_rounding_of_activations_adds_to_a_divergence_is_not_scaled(measured, floor):
    assert sensitivity._floor(measured) == pytest.approx(floor)


def test_batches_to_measure_on_are_spread_over_all_and_in_no_trial():
    calibration = collect([{"input_ids": torch.zeros(4, 256, dtype=torch.long)}] * 40, CONFIG, nsamples=160, alone=True)
    held_out, others = divided(calibration)
    assert len(held_out.numbers) == 4 and sum(batch.tokens for batch in held_out.batches) == 4096
    gaps = torch.tensor(held_out.numbers).diff()
    assert gaps.min() >= 9 and not set(held_out.numbers) & set(others.numbers)
    assert sum(batch.samples for batch in others.batches) == 32


def test_a_forward_that_differs_from_run_to_run_is_refused():
    model = tiny_llama()
    runs = []

    def forward(network, batch):
        runs.append(batch)
        return network(input_ids=batch["input_ids"] if len(runs) % 2 else batch["input_ids"].flip(1))

    with pytest.raises(CalibrationError, match="two runs of the float model"):
        measured(model, padded(4), options=PassOptions(forward))


def test_a_forward_without_logits_is_refused():
    with pytest.raises(TargetError, match="does not compute any with lm_head: define a forward"):
        measured(tiny_llama(), padded(4), options=PassOptions(lambda model, batch: model.model(batch["input_ids"])))


def test_one_batch_cannot_be_divided():
    with pytest.raises(CalibrationError, match="there is 1 batch: give more samples, or a smaller batch_size"):
        divided(collect(padded(1), CONFIG, alone=True))
