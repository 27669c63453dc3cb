"""With quantized layers in its tree a model computes what it does with float ones of their weights, or is refused."""

from __future__ import annotations

import contextvars
import itertools
import threading

import pytest
import torch
from torch import Tensor, nn

from gptq_plugin import QuantizeModule
from gptq_plugin.errors import TargetError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.swap_check import Trace

from models import tiny_gpt2, tiny_llama


class Using(nn.Module):
    """Uses its second layer in one way or another."""

    def __init__(self, use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)
        self.beside = [self.second]
        self.second.gain = 2.0
        self.use = use
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y: Tensor = self.third(torch.relu(self.use(self, torch.relu(self.first(x)))))
        return y


FAULTS = {
    "the input of third differs": lambda m, x: m.second(x) if type(m.second) is nn.Linear else m.second(x) * 2,
    "second are not called": lambda m, x: m.beside[0](x),
    "has no attribute 'gain'": lambda m, x: m.second(x) * m.second.gain,
    "second is called where it was third": lambda m, x: (
        m.second(x) if len(list(m.second.parameters())) else m.second(m.second(x))
    ),
    "the model does not run with quantized layers": lambda m, x: (
        m.second(x) if m.second._parameters["weight"].ndim == 2 else x
    ),
}


@pytest.mark.parametrize("where", FAULTS)
@pytest.mark.parametrize("how", ["quantize", "rehearse"])
def test_a_layer_that_is_used_by_more_than_a_call_is_refused_and_the_model_stays_float(where, how):
    model, x = Using(FAULTS[where]), torch.randn(64, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(TargetError, match=where) as refused:
        getattr(QuantizeModule(bits=8, group_size=32), how)(model, [x])
    assert "modules_to_not_convert" in str(refused.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("where", FAULTS)
def test_the_remedy_helps(where):
    model, x = Using(FAULTS[where]), torch.randn(64, 32)
    wanted = model(x)
    report = QuantizeModule(bits=8, group_size=32, modules_to_not_convert=["second"]).quantize(model, [x])
    assert [module.name for module in report.quantized] == ["first", "third"]
    assert (model(x) - wanted).norm() / wanted.norm() < 0.02


def test_a_difference_behind_the_last_layer_is_seen_too():
    class After(Using):
        def forward(self, x):
            y = super().forward(x)
            return y if isinstance(self.third, nn.Linear) else y * 1.1

    with pytest.raises(TargetError, match=r"computes something else: an output differs by 0\.0909|differs by 0\.1"):
        QuantizeModule(bits=8, group_size=32).quantize(After(lambda m, x: m.second(x)), [torch.randn(64, 32)])


ONE, NAN = torch.ones(3), torch.nan


def trace(calls, *sums, outputs=(ONE,)):
    return Trace(None, calls, torch.tensor(sums).reshape(-1, 2), outputs)


@pytest.mark.parametrize(
    ("found", "where"),
    [
        (trace(["a", "a"], [1.0, 2.0], [1.0, 2.0]), "layers are called 2 times instead of 1"),
        (trace(["a"], [1.0, 2.0], outputs=(torch.ones(1),)), "the shapes of the outputs differ"),
        (trace(["a"], [1.0, 2.0], outputs=(ONE, ONE)), "the shapes of the outputs differ"),
        (trace(["a"], [1.1, 2.0]), "the input of a differs"),
        (trace(["a"], [1.0, 2.1]), "the input of a differs"),
        (trace(["a"], [NAN, NAN]), "the input of a differs"),
        (trace(["a"], [1.001, 2.001], outputs=(ONE * (1 + 1e-6),)), None),  # as much as rounding moves them
    ],
)
def test_where_two_runs_part_is_told(found, where):
    assert found.first_difference(trace(["a"], [1.0, 2.0])) == where
    assert found.first_difference(found) is None


def test_layers_that_are_called_by_keyword_are_compared():
    model = Using(lambda m, x: m.second(input=x))
    report = QuantizeModule(bits=8, group_size=32).quantize(model, [torch.randn(64, 32)])
    assert len(report.quantized) == 3 and not [one for one in report.deviations if "compared" in one]


def test_a_forward_without_outputs_is_compared_by_what_the_layers_read():
    model = Using(FAULTS["the input of third differs"])
    with pytest.raises(TargetError, match="the input of third differs"):
        QuantizeModule(bits=8, group_size=32).quantize(
            model, [torch.randn(64, 32)], forward=lambda network, batch: [network(batch)].clear()
        )


def test_a_model_that_never_computes_the_same_is_not_compared_and_that_is_reported():
    numbers = itertools.count(1)
    model = Using(lambda m, x: m.second(x) * next(numbers))
    report = QuantizeModule(bits=8, group_size=32).quantize(model, [torch.randn(64, 32)])
    assert len(report.quantized) == 3
    assert any("not compared with the float ones in the model: two runs of the model" in d for d in report.deviations)


def test_what_a_forward_keeps_on_the_model_is_the_same_in_both_runs_and_stays_as_it_was():
    """Memory of the last call, which would differ; the walk gives it back, and so does the comparison."""

    def use(model, x):
        y = model.second(x) + (0 if model.memory is None else model.memory)
        model.memory = y.mean()
        return y

    model = Using(use)
    model.memory = None
    for how in ("rehearse", "quantize"):
        report = getattr(QuantizeModule(bits=8, group_size=32), how)(model, [torch.randn(64, 32) for _ in range(2)])
        assert model.memory is None or how == "rehearse"
        model.memory = None
    assert len(report.quantized) == 3 and not any("not compared" in deviation for deviation in report.deviations)


@pytest.mark.parametrize("how", ["quantize", "rehearse"])
def test_a_model_that_computes_something_else_on_another_thread_is_refused(how):
    own = threading.local()
    own.scale = 3.0
    model = Using(lambda m, x: m.second(x * getattr(own, "scale", 1.0)))
    with pytest.raises(TargetError, match=r"else than in yours: the input of second differs.*ContextVar"):
        getattr(QuantizeModule(bits=8, group_size=32), how)(model, [torch.randn(64, 32)])
    assert isinstance(model.second, nn.Linear)


def test_a_mode_that_is_entered_around_the_call_is_refused_and_one_in_the_forward_is_right():
    class Doubles(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result * 2 if function is torch.relu else result

    def forward(model, batch):
        with Doubles():
            return model(batch)

    model, x = Using(lambda m, x: m.second(x)), torch.randn(64, 32)
    with pytest.raises(TargetError, match="the input of second differs"), Doubles():
        QuantizeModule(bits=8, group_size=32).quantize(model, [x])
    inputs = []
    handle = model.second.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    forward(model, x)
    handle.remove()
    (_, second, _) = QuantizeModule(bits=8, group_size=32).quantize(model, [x], forward=forward).quantized
    assert second.max_input == pytest.approx(inputs[0].max().item(), rel=0.02)


def test_a_context_variable_of_the_caller_is_right():
    own = contextvars.ContextVar("scale", default=1.0)
    own.set(3.0)
    report = QuantizeModule(bits=8, group_size=32).quantize(
        Using(lambda m, x: m.second(x * own.get())), [torch.randn(64, 32)]
    )
    assert len(report.quantized) == 3 and not any("not compared" in deviation for deviation in report.deviations)


def test_random_numbers_are_the_same_in_both_runs_and_the_callers_stay_as_they_are():
    model = Using(lambda m, x: m.second(x) + torch.randn(64))
    with runs_of(model) as runs:
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        runs.check_swap(["second"])
    assert torch.equal(torch.rand(3), wanted)
    report = QuantizeModule(bits=8, group_size=32).quantize(model, [torch.randn(64, 32)])
    assert not any("not compared" in deviation for deviation in report.deviations)


def test_a_batch_that_does_not_run_in_part_runs_as_a_whole():
    def use(model, x):
        assert len(x) == 64
        return model.second(x)

    report = QuantizeModule(bits=8, group_size=32).quantize(Using(use), [torch.randn(64, 32)])
    assert len(report.quantized) == 3 and not any("not compared" in deviation for deviation in report.deviations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_both_runs_give_the_same_bits(build, dtype, monkeypatch):
    from gptq_plugin.quantize import swap_check

    compared = []
    monkeypatch.setattr(
        swap_check.Trace,
        "first_difference",
        lambda mine, other: compared.append((mine, other)),
    )
    model = build().to(dtype)
    QuantizeModule(bits=4, group_size=32).quantize(model, [torch.randint(4, 128, (1, 40)) for _ in range(4)])
    (mine, for_caller), (swapped, other) = compared
    assert mine is other and torch.equal(mine.sums, for_caller.sums)
    mine = swapped
    assert mine.calls == other.calls and len(mine.calls) >= 8
    assert torch.equal(mine.sums, other.sums)
    assert all(torch.equal(a, b) for a, b in zip(mine.outputs, other.outputs, strict=True))


def test_one_row_of_few_tokens_is_enough():
    model, shapes = tiny_llama(max_position_embeddings=128), []
    model.register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    QuantizeModule(bits=4, group_size=32).rehearse(model, [torch.randint(4, 128, (2, 100))])
    assert shapes[-2:] == [(1, 64), (1, 64)]


def test_the_tree_is_checked_with_the_quantized_weights_before_anything_is_exported(tmp_path, monkeypatch):
    """The float layers run with the weights of the quantized ones by then."""
    seen = []
    check = BatchRuns.check_swap

    def spy(runs, names):
        seen.append((sorted(names), runs._targets["first"].parameter.detach().clone()))
        return check(runs, names)

    monkeypatch.setattr(BatchRuns, "check_swap", spy)
    model = Using(lambda m, x: m.second(x))
    QuantizeModule(bits=4, group_size=32).quantize(model, [torch.randn(64, 32)])
    ((names, weight),) = seen
    assert names == ["first", "second", "third"]
    assert torch.equal(weight, model.first.dequantize()) and isinstance(model.first, QuantLinear)


def runs_of(model):
    from plans import calibration_of, plan_of

    from gptq_plugin.calibration.positions import Positions
    from gptq_plugin.quantize.options import PassOptions

    plan, calibration = plan_of(model), calibration_of([torch.randn(4, 32)])
    return BatchRuns(plan, calibration, Positions(model, calibration.batches, "all"), PassOptions())
