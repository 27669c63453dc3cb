"""Layers are judged by what they compute: their outputs against x·Wᵀ + b, and the model against its quantized self."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.errors import TargetError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.judgement import Judgement
from gptq_plugin.model.targets import Target

CONFIG = QuantizeConfig(bits=8, group_size=32, nsamples=256)


class Net(nn.Module):
    """Three layers; the one in the middle is what the tests change."""

    def __init__(self, middle: nn.Module | None = None, **kwargs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 32)
        self.middle = middle or nn.Linear(64, 64)
        self.kwargs = kwargs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)), **self.kwargs)))
        return y


def quantized(net: nn.Module, x: Tensor | None = None, forward=None):
    """The report, and how far the 8-bit model is from the float one."""
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)) if x is None else x
    run = forward or (lambda model, batch: model(batch))
    with torch.no_grad():
        before = run(net, x)
    report = QuantizeModule(CONFIG).quantize(net, [x], forward=forward)
    with torch.no_grad():
        return report, float((run(net, x) - before).norm() / before.norm())


def reason_of(report, name="middle"):
    (module,) = [module for module in report.modules if module.name == name]
    return module.reason if module.method == "float" else None


# --- layers that compute something else ---------------------------------------------------------------------


class Scaled(nn.Linear):
    """What it multiplies by is not in the class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self, "scale", 1.0)


class Upcast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.double(), self.weight.double(), self.bias.double())


class LastToken(nn.Linear):
    """Adds to one row only, and to one entry of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if getattr(self, "steer", 0):
            y[-1, 3] += self.steer
        return y


class LoraLinear(nn.Linear):
    """The low rank parts are parameters of the layer itself; without them it is a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + x @ self.lora_a.T @ self.lora_b.T if hasattr(self, "lora_a") else y


def scaled():
    layer = Scaled(64, 64)
    layer.scale = 3.0
    return layer


def scaled_a_little():
    layer = Scaled(64, 64)
    layer.scale = 1.01
    return layer


def steered():
    layer = LastToken(64, 64)
    layer.steer = 0.5
    return layer


def lora():
    layer = LoraLinear(64, 64)
    layer.lora_a, layer.lora_b = (nn.Parameter(torch.randn(shape)) for shape in ((4, 64), (64, 4)))
    return layer


def forward_set(change):
    def make():
        layer = nn.Linear(64, 64)
        layer.forward = change(layer)
        return layer

    return make


def method_set():
    layer = nn.Linear(64, 64)
    layer.forward = types.MethodType(lambda self, x: functional.linear(x, self.weight) + 1, layer)
    return layer


def cut_input():
    layer = nn.Linear(64, 64)
    own = layer.forward
    layer.forward = lambda x: own(x.clamp(max=0.5))
    return layer


OTHERWISE = {
    "a scale that only the instance has": scaled,
    "a scale of 1.01": scaled_a_little,
    "one entry of one row": steered,
    "low rank parts": lora,
    "a forward set on the instance": forward_set(lambda layer: lambda x: functional.linear(x, layer.weight) * 2),
    "a method set on the instance": method_set,
    "a wrapper that cuts its input": cut_input,
}


@pytest.mark.parametrize("make", OTHERWISE.values(), ids=OTHERWISE)
def test_a_layer_that_computes_something_else_stays_float_with_the_reason(make, caplog):
    report, apart = quantized(net := Net(make()))
    assert "computes something else than x·Wᵀ + b" in reason_of(report)
    assert f"middle: {reason_of(report)}" in list(report.all_deviations()) and "middle: " in caplog.text
    assert [module.name for module in report.quantized] == ["first", "last"]
    assert apart < 0.02 and not isinstance(net.middle, QuantLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [scaled, scaled_a_little, lora], ids=["3", "1.01", "lora"])
def test_so_does_it_in_16_bits(make, dtype):
    x = torch.randn(256, 64, dtype=dtype)
    report, _ = quantized(Net(make()).to(dtype), x)
    assert "something else" in reason_of(report)


def test_a_layer_that_returns_another_dtype_stays_float():
    net = Net(Upcast(64, 64))
    report, _ = quantized(net, forward=lambda model, x: model.last(model.middle(model.first(x)).float()))
    assert "it returns torch.float64" in reason_of(report)


class Extra(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


def test_a_layer_that_is_called_with_more_than_its_input_stays_float():
    report, apart = quantized(Net(Extra(64, 64), scale=1.0))
    assert reason_of(report).startswith("it is called with 2 arguments, and a quantized layer takes its input alone")
    assert apart < 0.02


class Writing(nn.Linear):
    """It returns the product, and writes to what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        x.mul_(2)
        return output


def test_a_layer_that_writes_to_its_input_stays_float():
    report, apart = quantized(Net(Writing(64, 64)))
    assert reason_of(report).startswith("its forward writes to its input") and apart < 0.02
    layer = Writing(64, 64)
    with torch.inference_mode():
        x = torch.randn(4, 64)
    with torch.inference_mode():  # nothing tells of it there; what is judged is the product of the input as it was
        judgement = Judgement(targets_of(layers := nn.Sequential(layer)))
        with judgement.watching():
            layers(x)
    assert judgement.reasons() == {}


def test_a_layer_may_be_called_with_its_input_by_name():
    class Named(Net):
        def forward(self, x):
            return self.last(input=torch.tanh(self.middle(input=self.first(input=x))))

    report, apart = quantized(Named())
    assert len(report.quantized) == 3 and apart < 0.02


# --- layers that cannot be judged by a forward --------------------------------------------------------------


class Doubling(Tensor):
    """Products with it are doubled."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 2 if function is functional.linear else result


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Property(nn.Linear):
    @property
    def weight(self):
        return self._parameters["weight"] * 2


def with_parametrization(name):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    def make():
        layer = nn.Linear(64, 64)
        parametrize.register_parametrization(layer, name, Twice())
        return layer

    return make


def of_subclass():
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubling))
    return layer


def weight_norm_by_hook():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(64, 64))


def with_state_hook():
    layer = nn.Linear(64, 64)
    layer.register_state_dict_post_hook(
        lambda _, state, prefix, __: state.update({f"{prefix}weight": torch.ones(64, 64)})
    )
    return layer


def property_of_class():
    layer = nn.Linear(64, 64)
    layer.__class__ = Property
    return layer


OBSTACLES = {
    "its weight is computed": with_parametrization("weight"),
    "its bias is computed": with_parametrization("bias"),
    "its weight is computed by a parametrization or a property": property_of_class,
    "its weight is a Doubling": of_subclass,
    "Called is called in its own way": lambda: Called(64, 64),
    "its state dict holds something else": with_state_hook,
    "computed by a parametrization": lambda: parametrizations.weight_norm(nn.Linear(64, 64)),
    "by a parametrization or a property": weight_norm_by_hook,
    "a property; remove it": lambda: parametrizations.spectral_norm(nn.Linear(64, 64)).eval(),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_is_around_a_weight_is_an_obstacle_before_any_forward(reason):
    report, apart = quantized(Net(OBSTACLES[reason]()))
    assert reason in reason_of(report) and apart < 0.02


def test_float8_weights_are_refused_with_the_remedy_or_left_out():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    net = Net(FP8Linear(64, 64, block_size=(32, 32)))
    with pytest.raises(TargetError, match=r"the weights of middle are torch.float8_e4m3fn.*FineGrainedFP8Config\(deq"):
        QuantizeModule(CONFIG).check(net)
    targets, skipped = QuantizeModule(bits=8, group_size=32, modules_to_not_convert=["middle"]).check(net)
    assert [target.name for target in targets] == ["first", "last"] and skipped[0].name == "middle"


def test_a_dequantized_float8_layer_is_quantized():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(64, 64, block_size=(32, 32))
    layer.weight = nn.Parameter(torch.randn(64, 64) / 8)
    report, apart = quantized(Net(layer))
    assert len(report.quantized) == 3 and apart < 0.02


def test_a_model_of_which_no_layer_computes_a_product_is_refused_by_quantize_and_rehearse():
    net, x = nn.Sequential(scaled(), nn.Tanh()), torch.randn(64, 64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for run in (QuantizeModule(CONFIG).quantize, QuantizeModule(CONFIG).rehearse):
        with pytest.raises(TargetError, match=r"no layer is left to quantize: 0: Scaled.forward computes something"):
            run(net, [x])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_rehearsal_tells_what_will_stay_float(caplog):
    QuantizeModule(CONFIG).rehearse(Net(scaled()), [torch.randn(64, 64)])
    assert "middle: Scaled.forward computes something else" in caplog.text
    assert "it will be left float" in caplog.text and "first" not in caplog.text


# --- layers that compute x·Wᵀ + b, whatever they are ---------------------------------------------------------


class Counting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def logged():
    layer, calls = nn.Linear(64, 64), []
    own = layer.forward
    layer.forward = lambda x: calls.append(1) or own(x)
    return layer


def of_accelerate():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    return add_hook_to_module(nn.Linear(64, 64), AlignDevicesHook(execution_device="cpu", io_same_device=True))


def low_rank_that_is_zero():
    layer = lora()
    nn.init.zeros_(layer.lora_b)
    return layer


@pytest.mark.parametrize("make", [lambda: Counting(64, 64), logged, of_accelerate, low_rank_that_is_zero])
def test_a_layer_that_computes_a_product_is_quantized(make):
    report, apart = quantized(Net(make()))
    assert len(report.quantized) == 3 and apart < 0.02


def test_a_forward_on_the_instance_that_agrees_is_replaced_and_that_is_reported():
    report, _ = quantized(Net(logged()))
    assert any("the forward that is set on middle computes x·Wᵀ + b" in deviation for deviation in report.deviations)
    report, _ = quantized(Net())
    assert not any("forward that is set" in deviation for deviation in report.deviations)


SPECIAL = ["plain", "large channels", "no rows", "one row", "NaN in padding"]


def special_input(special: str, width: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    x = torch.randn({"no rows": 0, "one row": 1}.get(special, 40), width, dtype=dtype, device=device)
    if special == "large channels":
        x[:, 3] *= 300
    if special == "NaN in padding":
        x[7:] = torch.nan
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [33, 96, 1000])
@pytest.mark.parametrize("special", SPECIAL)
def test_rounding_is_no_difference(dtype, width, special):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(width, 80), nn.GELU(), nn.Linear(80, 24, bias=False)).to(dtype)
    x = special_input(special, width, dtype)
    assert judged(layers, lambda: layers(x)) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("special", [*SPECIAL, "large weights"])
def test_a_gpu_judges_as_a_cpu_does(dtype, special):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(1000, 80), nn.Linear(80, 24, bias=False)).to("cuda", dtype)
    x = special_input(special, 1000, dtype, "cuda")
    if special == "large weights":  # (Wᵀ R) is beyond float16 there
        layers[0].weight.data[:, 5], x[:, 5] = 3e4, 1e-3
    assert judged(layers, lambda: layers(x)) == {}
    if len(x) > 1:
        wrong = nn.Sequential(Scaled(1000, 80)).to("cuda", dtype)
        wrong[0].scale = 1.01
        assert set(judged(wrong, lambda: wrong(x))) == {"0"}


@pytest.mark.parametrize("setting", ["autocast", "medium", "autocast, 16-bit weights"])
def test_neither_is_fewer_bits_that_the_caller_asked_for(setting):
    layers = nn.Sequential(nn.Linear(256, 80), nn.GELU(), nn.Linear(80, 24))
    x = torch.randn(40, 256)
    if setting == "medium":
        torch.set_float32_matmul_precision("medium")
        try:
            assert judged(layers, lambda: layers(x)) == {}
        finally:
            torch.set_float32_matmul_precision("highest")
        return
    if "weights" in setting:
        layers.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert judged(layers, lambda: layers(x)) == {}


def test_every_call_is_judged_and_all_layers_that_were_called_are_told():
    layers = nn.Sequential(LastToken(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))

    def run():
        layers[1](layers[0](torch.randn(4, 16)))
        layers[0].steer = 1.0
        layers[0](torch.randn(4, 16))

    judgement = Judgement(targets_of(layers))
    with torch.no_grad(), judgement.watching():
        run()
    assert judgement.reached == {"0", "1"} and set(judgement.reasons()) == {"0"}
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_a_weight_that_changes_between_calls_is_judged_as_it_is():
    layer = nn.Linear(16, 16)

    def run():
        layer(x := torch.randn(4, 16))
        layer.weight.data = layer.weight.data * 2
        layer.weight.mul_(2)
        layer(x)

    assert judged(nn.Sequential(layer), run) == {}


def test_the_callers_random_numbers_stay_as_they_are():
    layers = nn.Sequential(nn.Linear(16, 16))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    judged(layers, lambda: layers(torch.ones(4, 16)))
    assert torch.equal(torch.rand(2), wanted)


# --- layers that the planning forward does not reach ---------------------------------------------------------


class Branched(nn.Module):
    """Short batches take the branch, which the planning forward, of the largest, does not."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.branch = nn.Linear(64, 64), branch

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(functional.one_hot(input_ids, 64).float())
        y: Tensor = self.branch(x) if input_ids.shape[1] < 30 else x
        return y


def token_batches():
    return [torch.randint(0, 64, (1, 20 if number == 3 else 60)) for number in range(8)]


def test_a_layer_that_the_planning_forward_does_not_reach_is_tried_out_and_stays_float():
    report = QuantizeModule(CONFIG).quantize(model := Branched(scaled()), token_batches())
    assert "Scaled.forward computes something else" in reason_of(report, "branch")
    assert isinstance(model.branch, Scaled)


def test_a_layer_whose_forward_does_not_run_alone_stays_float():
    class Needs(nn.Linear):
        def forward(self, x, more=None):
            return super().forward(x) if type(self) is not Needs or x.dim() == 3 or x.shape[-1] == 5 else self.nothing

    report = QuantizeModule(CONFIG).quantize(Branched(Needs(64, 64)), token_batches())
    assert "its forward does not run on its input alone (AttributeError" in reason_of(report, "branch")


def test_such_a_layer_that_computes_a_product_is_quantized():
    report = QuantizeModule(CONFIG).quantize(model := Branched(nn.Linear(64, 64)), token_batches())
    assert reason_of(report, "branch") is None and isinstance(model.branch, QuantLinear)


def test_what_only_a_later_batch_shows_is_refused_with_the_remedy_and_nothing_changes():
    class OnSequences(nn.Linear):
        """Trials have two dimensions, the model's calls have three."""

        def forward(self, x):
            return super().forward(x) * (2 if x.dim() == 3 and x.shape[1] > 5 else 1)

    model = Branched(OnSequences(64, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TargetError, match=r"branch is called by this batch for the first time, and OnSeq"):
        QuantizeModule(CONFIG).quantize(model, token_batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = QuantizeModule(bits=8, group_size=32, modules_to_not_convert=["branch"]).quantize(model, token_batches())
    assert [module.name for module in report.quantized] == ["first"]


def targets_of(model: nn.Module) -> list[Target]:
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return [Target(name, layer, CONFIG) for name, layer in layers]


def judged(model: nn.Module, run) -> dict[str, str]:
    judgement = Judgement(targets_of(model))
    with torch.no_grad():
        judgement.watched(run)()
    return judgement.reasons()
