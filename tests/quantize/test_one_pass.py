"""One pass: every layer is solved with what the quantized layers before it make of the batches."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from plans import CONFIG, Attention, Listed, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.gptq.solver import solve
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory.activations import Activations
from gptq_plugin.quantize import evidence
from gptq_plugin.quantize import one_pass as passes
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.evidence import Observations
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
    for name, layer in layers.items():  # each has its own rows of those solved at once
        weight = before[f"{name}.weight"]
        assert (layer.dequantize() - weight).norm() < 0.2 * weight.norm(), name


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

        def lasts(self, name):
            return True

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
    monkeypatch.setattr(
        passes, "solve_shared", lambda *args, in_blocks, **rest: asked.append(in_blocks) or solve_shared(*args, **rest)
    )
    passed(Attention(), [rows(100, 32)], exact_sums=exact)
    assert set(made) == set(asked) == {exact}


class Reads(nn.Module):
    """Calls a layer, and reads its weight by itself."""

    def __init__(self):
        super().__init__()
        self.read, self.behind = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.behind(self.read(x) + x @ self.read.weight)


def test_a_layer_that_is_called_and_read_stays_float_though_it_is_alone_in_its_group():
    layers, report = passed(Reads(), [rows(100, 32)])
    assert set(layers) == {"behind"}
    assert [(m.name, m.method) for m in report.modules] == [("read", "float"), ("behind", "gptq")]


def test_experts_at_the_models_end_that_no_token_reached_are_solved_when_the_walk_ends():
    torch.manual_seed(0)
    layers, _ = passed(nn.Sequential(Listed()), [rows(400, 32)])
    assert {"0.experts.3.0", "0.experts.3.2"} <= set(layers)


def test_batches_that_reach_no_layer_are_refused():
    with pytest.raises(CalibrationError, match="no calibration batch reached any of the 4 layers"):
        passed(Attention(), [rows(100, 32)], forward=lambda network, batch: batch)


def test_a_layer_behind_others_may_see_fewer_tokens_than_it_has_inputs():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.last(self.first(x)[-1:])

    _, report = passed(Last(), [rows(100, 32)])
    assert [(m.name, m.tokens) for m in report.modules] == [("first", 100), ("last", 1)]


class Chosen(nn.Module):
    """A batch goes to the first expert and the layer behind, and some batches to the second expert afterwards."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 2, bias=False)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(2))

        def forward(self, x, number):
            return self.experts[number](x) * self.gate(x).amax(-1, keepdim=True)

    def __init__(self):
        super().__init__()
        self.block, self.behind = self.Experts(), nn.Linear(32, 32)

    def forward(self, x):
        y = self.behind(self.block(x, 0))
        return self.block(y, 1) if x[0, 0] > 0 else y


def test_an_expert_that_a_batch_reaches_after_it_was_solved_is_told_and_not_solved_again():
    torch.manual_seed(0)
    done = []
    batches = [rows(200, 32).abs().neg(), rows(50, 32).abs()]  # the largest shows the order
    config = QuantizeConfig(group_size=16, nsamples=250)
    one_pass = OnePass(
        plan_of(Chosen(), config),
        calibration_of(batches, config),
        PassOptions(progress=lambda *step: done.append(step)),
    )
    _, report = one_pass.run()
    assert sorted(names for *_, names in done) == ["behind", "block.experts.0.0", "block.experts.1.0"]
    late = [one for one in report.all_deviations() if "after it was quantized" in one]
    assert late and all("block.experts.1.0" in one for one in late)
    assert not one_pass._observations._hessians  # they are as large as the layers


@pytest.fixture
def observed(monkeypatch):
    """Kinds of observations, and whether the memory they take was left out of the batches'."""
    inside, seen = [], []

    @contextlib.contextmanager
    def untracked(self):
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(Activations, "untracked", untracked)
    for kind in ("observe", "observe_experts"):
        observe = getattr(Observations, kind)
        monkeypatch.setattr(
            Observations, kind, lambda *args, kind=kind, f=observe: seen.append((kind, bool(inside))) or f(*args)
        )
    return seen


@pytest.mark.parametrize("alone", [False, True])
def test_what_enters_experts_is_observed_once_a_batch_and_not_as_the_batches_memory(
    alone, observed, monkeypatch, caplog
):
    torch.manual_seed(0)
    if alone:
        monkeypatch.setattr(BatchRuns, "disturbance", lambda self, layers: "asked for")
    _, report = passed(nn.Sequential(Listed()), [rows(200, 32, seed) for seed in range(2)])
    assert observed.count(("observe_experts", True)) == 2 and set(observed) == {
        ("observe", True),
        ("observe_experts", True),
    }
    assert any("one at a time" in one for one in report.deviations) == alone
    assert any("one at a time" in one and "asked for" in one for one in caplog.messages) == alone


def test_layers_that_find_no_room_beside_each_other_are_put_there_again(monkeypatch):
    torch.manual_seed(0)
    model = Attention()
    right, _ = passed(model, [rows(100, 32)])
    calls, cat = [], torch.cat

    def scarce(tensors, *args):
        if isinstance(tensors, list):
            calls.append(len(tensors))
            if len(calls) == 1:
                raise torch.OutOfMemoryError("no room")
        return cat(tensors, *args)

    monkeypatch.setattr(passes, "torch", SimpleNamespace(**{**vars(torch), "cat": scarce}))
    layers, report = passed(model, [rows(100, 32)])
    assert calls == [3, 3] and all(torch.equal(right[name].qweight, layers[name].qweight) for name in "qkvo")
    assert any("ran out of memory once" in one for one in report.deviations)


def test_as_many_samples_as_asked_are_no_deviation_and_memory_and_all_ranks_remarks_are(monkeypatch):
    config = QuantizeConfig(group_size=16, nsamples=100)
    assert passed(Attention(), [rows(100, 32)], config)[1].deviations == []
    monkeypatch.setattr(BatchRuns, "over_budget", lambda self: ["no room"])
    monkeypatch.setattr(passes, "sum_over_ranks", lambda notes: {**dict.fromkeys(notes, 0), "are odd": 2})
    _, report = passed(Attention(), [rows(100, 32)], config)
    assert report.deviations == ["no room", "2 calibration batches are odd"]


def test_the_bias_and_the_dtype_of_a_layer_are_kept():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32)).to(torch.bfloat16)
    layers, _ = passed(model, [rows(100, 32).to(torch.bfloat16)])
    assert layers["0"].bias is None and torch.equal(layers["1"].bias, model[1].bias)
    assert {layer.weight.dtype for layer in layers.values()} == {torch.bfloat16}


# --- what is let go of, and when ---


def test_what_entered_experts_is_dropped_when_the_walk_leaves_them():
    torch.manual_seed(0)
    model, held = nn.Sequential(Listed(), nn.Linear(32, 32)), {}

    def look(done, total, names):
        experts = one_pass._observations._experts
        held[names] = len(experts._sums) + len(experts._means)

    one_pass = OnePass(plan_of(model), calibration_of([rows(400, 32)]), PassOptions(progress=look))
    one_pass.run()
    assert held["0.experts.3.0"] == 1 and held["1"] == 0


def test_a_group_of_which_every_layer_stays_float_costs_no_run_of_the_batches(monkeypatch):
    monkeypatch.setattr(BatchRuns, "disturbance", lambda self, layers: "asked for")  # a run of all for every group
    runs, before = [], []
    passed(
        Reads(), [rows(100, 32, seed) for seed in range(2)],
        forward=lambda network, batch: runs.append(batch) or network(batch),
        progress=lambda *_: before.append(len(runs)),
    )  # fmt: skip
    assert before == [1 + 2]  # the planning forward, and two batches to the only group


class Files:
    """Takes layers, and has their files at once."""

    def __init__(self):
        self.tensors = {}

    def add(self, name, layer):
        self.tensors[name] = {key: value.clone() for key, value in layer.named_buffers()}

    def lasts(self, name):
        return True

    def written(self, name):
        return self.tensors[name]

    def hold(self, name, layer):
        return all(value is self.tensors[name][key] for key, value in layer.named_buffers())


def test_the_memory_of_layers_that_are_in_files_is_let_go_during_the_walk_and_of_the_last_one_at_its_end():
    model, files, seen = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))), Files(), []

    def look(done, total, names):
        seen.append([files.hold(name, layer) for name, layer in one_pass._finished.layers.items()])

    options = PassOptions(layers_in=files, progress=look)
    one_pass = OnePass(plan_of(model), calibration_of([rows(100, 32)]), options)
    layers, _ = one_pass.run()
    assert seen == [[False], [True, False], [True, True, False]]
    assert len(layers) == 3 and all(files.hold(name, layer) for name, layer in layers.items())


def test_the_time_of_calibration_is_without_the_solvers(monkeypatch):
    def slow(*args, **options):
        time.sleep(0.2)
        return solve_shared(*args, **options)

    solve_shared = passes.solve_shared
    monkeypatch.setattr(passes, "solve_shared", slow)
    started = time.perf_counter()
    _, report = passed(Attention(), [rows(100, 32)])
    assert report.seconds["solve"] >= 0.4  # of two groups
    assert sum(report.seconds.values()) <= time.perf_counter() - started


def test_the_largest_outputs_are_reported_beside_the_largest_inputs():
    model, x = nn.Sequential(nn.Linear(32, 48)), rows(100, 32)
    _, report = passed(model, [x], QuantizeConfig(bits=8, group_size=16, nsamples=1000))
    (layer,) = report.modules
    assert layer.max_input == pytest.approx(float(x.abs().max()))
    assert layer.max_output == pytest.approx(float(model(x).detach().abs().max()), rel=0.01)


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_that_moves_layers_outlives_the_pass(fails):
    model = nn.Sequential(nn.Linear(32, 32))
    one_pass = OnePass(plan_of(model), calibration_of([rows(31 if fails else 100, 32)]), PassOptions())
    one_pass._finished._worker.submit(int).result()
    with pytest.raises(CalibrationError) if fails else contextlib.nullcontext():
        one_pass.run()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("finished-layers")]


def test_the_weights_that_layers_run_with_on_a_cpu_do_not_grow_with_the_model():
    """Of all layers behind those in use the float weights are in place again, which may be mapped from files."""
    peaks = {}
    for blocks in (24, 48):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(blocks)))
        one_pass = OnePass(plan_of(model), calibration_of([rows(100, 32)]), PassOptions())
        layers, _ = one_pass.run()
        assert len(layers) == 2 * blocks
        peaks[blocks] = one_pass.runs.weights.peak_bytes / (sum(p.nbytes for p in model.parameters()) / blocks)
    assert peaks[48] == peaks[24] <= 3  # blocks
