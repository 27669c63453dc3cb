"""From solved layers to the report."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from plans import CONFIG, Listed, calibration_of, plan_of, rows
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.precision import FLOAT16
from gptq_plugin.device.streams import Stopwatch
from gptq_plugin.errors import CalibrationError
from gptq_plugin.gptq.solver import solve
from gptq_plugin.model.targets import Skipped
from gptq_plugin.quantize.data_checks import Samples
from gptq_plugin.quantize.outcome import Outcome, float_reports, module_report, sum_over_ranks
from gptq_plugin.walk.expert_hessians import Evidence

SAMPLES = Samples(3, "0" * 64, "run")
CPU = torch.device("cpu")


class Timed(Stopwatch):
    def __init__(self, seconds):
        super().__init__(CPU)
        self.stop()
        self.seconds = lambda: seconds


def solved(model, names, outcome=None, *, seconds=1.0, damp_percent=0.0, tokens=50, remarks=()):
    """Solves the layers together, as the pass does."""
    plan = plan_of(model)
    targets = [target for target in plan.targets if target.name in names]
    outcome = outcome or Outcome(plan)
    x = rows(64, targets[0].weight.shape[1])
    evidence = Evidence(x.T @ x / 64, tokens, damp_percent, remarks)
    config = dataclasses.replace(targets[0].config, damp_percent=damp_percent or targets[0].config.damp_percent)
    solution = solve(torch.cat([target.weight for target in targets]), evidence.mean, config)
    solution = dataclasses.replace(solution, deviations=("the solver's",))
    outcome.add(targets, solution, evidence, Timed(seconds))
    return outcome, solution


def unknown_ranges(names):
    return dict.fromkeys(names, (math.nan, math.nan))


def pair():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(32, 48), "b": nn.Linear(32, 16), "idle": nn.Linear(32, 32)})


def test_layers_solved_together_have_the_losses_of_their_own_rows_and_time_by_rows():
    outcome, solution = solved(pair(), ("a", "b"), seconds=8.0, tokens=77)
    a, b, _ = outcome.modules(unknown_ranges(("a", "b", "idle")), {"b": ("odd (2 batches)",)})
    assert (a.name, b.name, a.method, b.tokens) == ("a", "b", "gptq", 77)
    for module, part in ((a, slice(0, 48)), (b, slice(48, 64))):
        assert module.loss == pytest.approx(float(solution.loss[part].sum()))
        assert module.rtn_loss == pytest.approx(float(solution.rtn_loss[part].sum()))
        assert module.output_power == pytest.approx(float(solution.output_power[part].sum()))
        assert 0 < module.loss < module.rtn_loss
    assert (a.seconds, b.seconds) == (6.0, 2.0) and outcome.solving_seconds() == 8.0
    assert (a.bits, a.group_size, a.shape, a.damp_percent) == (4, 16, (48, 32), 0.01)
    assert set(outcome.solved) == {"a", "b"} and "odd (2 batches)" in b.deviations


def test_a_layers_deviations_are_the_solutions_then_the_evidences_then_its_values():
    outcome, _ = solved(pair(), ("a",), remarks=("few tokens",))
    near = {"a": (2 * FLOAT16, 1.0), "b": (0.0, 0.0), "idle": (0.0, 0.0)}
    module = outcome.modules(near, {})[0]
    assert module.deviations[:-1] == ("the solver's", "few tokens") and "float16" in module.deviations[-1]
    assert (module.max_input, module.max_output) == near["a"]


def test_targets_that_were_not_solved_are_float_with_the_reason():
    outcome, _ = solved(pair(), ("a",))
    outcome.left_float["b"] = "the model reads its weight by itself"
    _, b, idle = outcome.modules(unknown_ranges(("a", "b", "idle")), {})
    assert b.method == idle.method == "float" and b.bits is None
    assert b.reason == "the model reads its weight by itself: left float"
    assert idle.reason == "never called in calibration: left float"
    assert idle.deviations == (idle.reason,)


def test_nothing_solved_is_refused():
    outcome = Outcome(plan_of(pair()))
    with pytest.raises(CalibrationError, match="no calibration batch reached any of the 3 layers"):
        outcome.check_reached()
    solved(pair(), ("a",), outcome)
    outcome.check_reached()


def test_the_report_adds_up_what_ranks_tell(monkeypatch):
    outcome, _ = solved(pair(), ("a",))
    outcome.add_late("a", 2)
    outcome.add_late("a", 1)
    outcome.notes.late["b"] = 4
    calibration = calibration_of([rows(3, 32)])
    calibration.deviations[:] = ["dropped 1", "dropped 2"]
    calibration.sources.update({"train": 2})
    others = {
        repr((calibration.deviations, 3)): (["dropped 2", "dropped 3"], 7),
        repr({"train": 2}): {"train": 5, "mix": 1},
        repr({"b": 4, "a": 3}): {"a": 10},
    }
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, others[repr(own)]])
    modules = outcome.modules(unknown_ranges(("a", "b", "idle")), {})
    report = outcome.report(modules, SAMPLES, calibration, {"solve": 1.0}, ["memory"], outcome.late())
    assert report.deviations == [
        "dropped 1",
        "dropped 2",
        "dropped 3",
        "memory",
        "b: 4 calls came after it was quantized; their inputs are not in its Hessian",
        "a: 13 calls came after it was quantized; their inputs are not in its Hessian",
    ]
    assert report.calibration == "7 samples of train; 1 samples of mix"
    assert (report.samples, report.tokens, report.run_id, report.seconds) == (3, 50, "run", {"solve": 1.0})
    assert report.batch_size == 7
    assert report.calibration_sha256 == "0" * 64 and report.config == CONFIG
    assert [module.name for module in report.modules] == ["a", "b", "idle"]


def test_experts_that_are_damped_more_are_told_in_one_sentence_and_other_layers_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(Listed(), nn.Linear(32, 32))
    outcome = Outcome(plan_of(model))
    for name, damp in (("0.experts.0.0", 0.2), ("0.experts.1.0", 0.3), ("0.experts.2.0", 0.0), ("1", 0.5)):
        solved(model, (name,), outcome, damp_percent=damp)
    plan = plan_of(model)
    modules = outcome.modules(unknown_ranges([target.name for target in plan.targets]), {})
    report = outcome.report(modules, SAMPLES, calibration_of([rows(3, 32)]), {}, [], outcome.late())
    (told,) = (deviation for deviation in report.deviations if "damped" in deviation)
    assert told.startswith("2 layers of experts are damped more than damp_percent asks, up to 0.3, ")
    assert "0.gate" in [module.name for module in report.modules]  # the router, which the plan leaves float


def test_layers_left_float_deviate_unless_that_was_asked():
    layer = nn.Linear(32, 10)
    asked, not_asked = float_reports(
        [Skipped("a", layer, "by a rule", asked=True), Skipped("b", layer, "out_features 10", asked=False)]
    )
    assert (asked.method, asked.shape, asked.bits, asked.reason) == ("float", (10, 32), None, "by a rule")
    assert asked.deviations == () and not_asked.deviations == ("out_features 10",)


def test_a_targets_own_deviation_is_told_of_a_quantized_layer_and_not_of_a_float_one():
    model = nn.Sequential(nn.Linear(48, 32))
    (target,) = plan_of(model, QuantizeConfig(group_size=32)).targets  # 32 does not divide 48
    quantized = module_report(target, method="rtn", deviations=("more",))
    assert quantized.deviations == (*target.deviations, "more") and target.deviations
    assert quantized.stored_bytes > 0
    left = module_report(target, method="float", reason="why", deviations=("why",))
    assert left.deviations == ("why",) and (left.bits, left.group_size, left.stored_bytes) == (None, None, 0)


def test_counts_of_ranks_add_up_by_key(monkeypatch):
    assert sum_over_ranks({"a": 1}) == {"a": 1}
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, {"a": 2, "b": 3}, {}])
    assert sum_over_ranks({"a": 1}) == {"a": 3, "b": 3}


def test_weights_too_small_for_float16s_scales_are_told_of_their_own_layer_alone():
    model = pair()
    model["b"].weight.data *= 1e-6
    outcome, _ = solved(model, ("a", "b"))
    a, b, _ = outcome.modules(unknown_ranges(("a", "b", "idle")), {})
    assert not any("float16" in line for line in a.deviations)
    assert any(line.startswith("weights in 32 groups are so small that float16") for line in b.deviations)
