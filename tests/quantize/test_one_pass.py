"""One pass: every layer is solved with what the quantized layers before it make of the batches."""

from __future__ import annotations

import pytest
import torch
from plans import CONFIG, Attention, Listed, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.gptq.solver import solve
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.quantize import evidence
from gptq_plugin.quantize import one_pass as passes
from gptq_plugin.quantize.one_pass import OnePass
from gptq_plugin.quantize.options import PassOptions


def passed(model, batches, config=CONFIG, **options):
    return OnePass(plan_of(model, config), calibration_of(batches, config), PassOptions(**options)).run()


@pytest.fixture
def solved(monkeypatch):
    """What the solver was given: rows and inputs of the weight, and the configuration, call by call."""
    calls = []

    def solve_shared(weight, hessian, config, **_):
        calls.append((tuple(weight.shape), hessian.clone(), config))
        return solve(weight, hessian, config)

    monkeypatch.setattr(passes, "solve_shared", solve_shared)
    return calls


def test_layers_with_one_input_are_solved_at_once_and_the_next_reads_what_they_give_quantized(solved):
    torch.manual_seed(0)
    model, x = Attention(), rows(200, 32)
    with torch.no_grad():
        layers, report = passed(model, [x], QuantizeConfig(bits=2, group_size=16, nsamples=1000))
        assert [shape for shape, _, _ in solved] == [(96, 32), (32, 32)]
        torch.testing.assert_close(solved[0][1], x.T @ x / 200)
        q, k, v = (x @ layers[name].dequantize().T for name in "qkv")
        behind = torch.sigmoid(q) * k + v
        torch.testing.assert_close(solved[1][1], behind.T @ behind / 200, rtol=1e-4, atol=1e-5)
        floats = torch.sigmoid(model.q(x)) * model.k(x) + model.v(x)
        assert not torch.allclose(solved[1][1], floats.T @ floats / 200, rtol=0.01)
    assert [module.name for module in report.modules] == ["q", "k", "v", "o"]


def test_the_model_is_float_afterwards_and_the_layers_are_handed_over():
    model = Attention()
    before = dict(model.named_parameters())
    layers, report = passed(model, [rows(100, 32)])
    assert set(layers) == set("qkvo") and all(isinstance(layer, QuantLinear) for layer in layers.values())
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert {"plan", "calibrate", "solve"} == set(report.seconds) and min(report.seconds.values()) >= 0


def test_layers_of_other_configurations_are_solved_apart_from_one_hessian(solved):
    config = QuantizeConfig(group_size=16, nsamples=1000, dynamic={"k": {"bits": 8}})
    layers, _ = passed(Attention(), [rows(100, 32)], config)
    assert [(shape, own.bits) for shape, _, own in solved] == [((64, 32), 4), ((32, 32), 8), ((32, 32), 4)]
    assert torch.equal(solved[0][1], solved[1][1])
    assert (layers["q"].bits, layers["k"].bits, layers["v"].bits) == (4, 8, 4)


def test_progress_tells_the_layers_that_are_done():
    steps = []
    passed(Attention(), [rows(100, 32)], progress=lambda *step: steps.append(step))
    assert steps == [(3, 4, "q, k, v"), (4, 4, "o")]


def test_finished_layers_are_stored_as_they_come():
    class Store:
        def __init__(self):
            self.names = []

        def add(self, name, layer):
            self.names.append(name)

        def written(self, name):
            return None

    store = Store()
    passed(Attention(), [rows(100, 32)], layers_in=store, progress=lambda done, *_: store.names.append(done))
    assert store.names == ["q", "k", "v", 3, "o", 4]


def test_experts_that_no_token_reached_are_solved_when_the_walk_leaves_them(solved):
    torch.manual_seed(0)
    model = nn.Sequential(Listed(), nn.Linear(32, 32))
    order = []
    layers, report = passed(model, [rows(400, 32)], progress=lambda done, total, names: order.append(names))
    assert order[-3:] == ["0.experts.3.0", "0.experts.3.2", "1"]
    by_name = {module.name: module for module in report.modules}
    assert by_name["0.experts.3.0"].method == "gptq" and by_name["0.experts.3.0"].tokens == 0
    assert by_name["0.experts.3.2"].method == "rtn" and set(layers) == {t.name for t in plan_of(model).targets}


def test_experts_with_few_tokens_are_damped_as_their_evidence_asks(solved):
    torch.manual_seed(0)
    passed(nn.Sequential(Listed()), [rows(120, 32)])
    damping = {shape: config.damp_percent for shape, _, config in solved}
    assert damping[64, 32] == CONFIG.damp_percent < damping[32, 64] <= 0.9


def test_a_batch_that_comes_back_to_experts_that_were_left_is_told():
    class Twice(nn.Module):
        """Its batches go through the experts and the layer behind them, and some through the experts again."""

        def __init__(self):
            super().__init__()
            self.listed, self.behind = Listed(), nn.Linear(32, 32)

        def forward(self, x):
            y = self.behind(self.listed(x))
            return self.listed(y) if x[0, 0] > 0 else y

    torch.manual_seed(0)
    # The first goes once, so the groups are found with one call each; the second comes back.
    batches = [rows(200, 32).abs().neg(), rows(150, 32).abs()]
    _, report = passed(Twice(), batches, QuantizeConfig(group_size=16, nsamples=1000, batch_size=1000))
    late = [deviation for deviation in report.deviations if "came after it was quantized" in deviation]
    assert late and all("listed.experts" in deviation or "behind" in deviation for deviation in late)


def test_a_weight_that_is_not_finite_is_refused_by_the_layers_name_and_inputs_by_their_batch():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(TargetError, match="^1: the weight holds NaN"):
        passed(model, [rows(100, 32)])
    batches = [rows(1, 32, seed=n) for n in range(40)]
    batches[7][0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"the input of q holds NaN or infinity in calibration batches \[7\]"):
        passed(Attention(), batches)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_of_layers_solved_together_the_one_whose_weight_is_wrong_is_blamed_alone(name):
    for value, message in (
        (float("nan"), "the weight holds NaN or infinity"),
        (1e9, "a weight of 1e.09 needs a scale"),
    ):
        model = Attention()
        with torch.no_grad():
            model.get_submodule(name).weight[3, 4] = value
        with pytest.raises(TargetError, match=f"^{name}: {message}"):
            passed(model, [rows(100, 32)])


def test_a_float_parameter_that_is_not_finite_is_blamed_instead_of_the_data():
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].bias[5] = float("nan")
    with pytest.raises(CalibrationError, match=r"input of 1 holds NaN or infinity, since 0\.bias of the model does"):
        passed(model, [rows(100, 32)])


def test_too_few_tokens_are_refused_at_the_first_layer():
    done = []
    with pytest.raises(CalibrationError, match="too short: 31 tokens in 31 samples"):
        passed(Attention(), [rows(31, 32)], progress=lambda *step: done.append(step))
    assert not done


def test_what_differs_from_the_request_is_told_once():
    config = QuantizeConfig(group_size=16, nsamples=512)
    _, report = passed(Attention(), [rows(100, 32)], config)
    assert report.deviations == ["100 calibration samples used, nsamples=512 asked"]
    assert (report.samples, report.tokens) == (100, 100) and len(report.run_id) == 32


def test_layers_whose_weights_the_model_reads_stay_float():
    layer = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, batch_first=True).eval()
    layers, report = passed(layer, [torch.randn(16, 8, 32)])
    assert set(layers) == {"linear1", "linear2"}
    assert {m.name: m.reason for m in report.modules if m.method == "float"} == {
        "self_attn.out_proj": "the model reads its weight by itself: left float"
    }


@pytest.mark.parametrize("exact", [True, False])
def test_exact_sums_reach_the_hessians_and_the_solver(exact, monkeypatch):
    made, asked = [], []
    hessian, solve_shared = evidence.Hessian, passes.solve_shared
    monkeypatch.setattr(evidence, "Hessian", lambda *args, exact: made.append(exact) or hessian(*args, exact=exact))
    monkeypatch.setattr(passes, "solve_shared", lambda *args, in_blocks: asked.append(in_blocks) or solve_shared(*args))
    passed(Attention(), [rows(100, 32)], exact_sums=exact)
    assert set(made) == set(asked) == {exact}
