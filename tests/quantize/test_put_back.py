"""Whatever raises, at whatever step, every float weight, hook, flag and folder is as it was."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule
from gptq_plugin.errors import TargetError

from models import tiny_llama

# The step, and the calls of it that fail, one after the other.
STEPS = {
    "model.judgement._Check.before": (9,),
    "model.judgement.Judgement.reasons": (1,),
    "quantize.one_pass.solve_shared": (1, 8),
    "layers.qlinear.pack_weight": (1, 14),
    "layers.qlinear.pack_zeros": (5,),
    "memory.weights._dequantized": (1, 14),
    "memory.slots.Slot.put": (1, 9),
    "memory.slots.Substitution.put": (3,),
    "memory.finished_layers.FinishedLayers.add": (1, 14),
    "memory.finished_layers.FinishedLayers.take_home": (2,),
    "walk.lockstep._Steps.arrive": (40,),
    "walk.batch_thread.BatchThread.wait_at": (12,),
    "quantize.swap_check.swap_modules": (1,),
    "quantize.swap_check._StandIn.forward": (1, 10),
    "quantize.in_place.swap_modules": (1,),
    "quantize.in_place.describe": (1,),
    "quantize.in_place.client_config": (1,),
    "quantize.outcome.Outcome.report": (1,),
    "layers.swap.share_hooks": (5, 33),
    "export.export.Export.add": (7,),
    "export.export.Export.finish": (1,),
    "export.verify_outputs.load_quantized": (1,),
}
INTERRUPTED = {"layers.qlinear.pack_zeros", "walk.batch_thread.BatchThread.wait_at", "quantize.in_place.describe"}


def failing(path, monkeypatch, when, error):
    """Lets a function or method of the package fail at one of its calls; returns the number of calls so far."""
    names, calls = path.split("."), []
    for depth in range(len(names) - 1, 0, -1):
        try:
            owner = importlib.import_module("gptq_plugin." + ".".join(names[:depth]))
        except ModuleNotFoundError:
            continue
        for name in names[depth:-1]:
            owner = getattr(owner, name)
        break
    own = getattr(owner, names[-1])

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            raise error
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, names[-1], fail)
    return calls


class Before:
    """A model with hooks, and everything that has to be the same afterwards."""

    def __init__(self) -> None:
        self.model = tiny_llama().train()
        self.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: y * 1.0)
        self.model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda module, args: None)
        self.modules = dict(self.model.named_modules())
        self.tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.values = [tensor.detach().clone() for _, tensor in self.tensors]
        self.flags = [(tensor.requires_grad) for _, tensor in self.tensors]
        self.hooks = self._hooks()
        self.config = self.model.config.to_dict()

    def _hooks(self):
        return {n: [dict(m._forward_hooks), dict(m._forward_pre_hooks)] for n, m in self.model.named_modules()}

    def is_back(self) -> None:
        assert dict(self.model.named_modules()) == self.modules
        found = [*self.model.named_parameters(), *self.model.named_buffers()]
        assert [name for name, _ in found] == [name for name, _ in self.tensors]
        assert all(mine is own for (_, mine), (_, own) in zip(found, self.tensors, strict=True))
        assert all(torch.equal(mine, value) for (_, mine), value in zip(found, self.values, strict=True))
        assert [tensor.requires_grad for _, tensor in found] == self.flags
        assert all(module.training for module in self.model.modules())
        assert self._hooks() == self.hooks
        assert self.model.config.to_dict() == self.config


def batches():
    return [torch.randint(4, 128, (1, 40), generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_may_fail(step, monkeypatch, tmp_path):
    kind = KeyboardInterrupt if step in INTERRUPTED else RuntimeError
    for when in STEPS[step]:
        before = Before()
        with monkeypatch.context() as patched:
            calls = failing(step, patched, when, kind("power cut"))
            with pytest.raises((kind, ValueError)):
                QuantizeModule(bits=4, group_size=32).quantize(before.model, batches(), export_dir=tmp_path / "out")
        assert len(calls) >= when, f"{step} was called {len(calls)} times"
        before.is_back()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", [1, 4, 6])
@pytest.mark.parametrize("hook", ["pre-hook", "hook", "forward of an activation"])
def test_the_users_code_may_fail_at_any_call(hook, call):
    before, calls = Before(), []

    def fail(*_):
        calls.append(1)
        if len(calls) == call:
            raise ValueError("a user's mistake")

    layer = before.model.model.layers[1].mlp
    if hook == "hook":
        layer.down_proj.register_forward_hook(fail)
    elif hook == "pre-hook":
        layer.down_proj.register_forward_pre_hook(fail)
    else:
        layer.act_fn.register_forward_hook(fail)
    before.hooks = before._hooks()
    try:
        with pytest.raises(ValueError, match="a user's mistake"):
            QuantizeModule(bits=4, group_size=32).quantize(before.model, batches())
    except pytest.fail.Exception:
        assert len(calls) > call  # the forward whose failure is reported, not raised
        return
    before.is_back()


@pytest.mark.parametrize("how", ["quantize", "rehearse", "temporarily"])
def test_inference_mode_is_refused_before_anything_is_touched(how):
    before = Before()
    quantizer = QuantizeModule(bits=4, group_size=32)
    with (
        torch.inference_mode(),
        pytest.raises(TargetError, match=r"inside torch\.inference_mode.*outside of that block"),
    ):
        if how == "temporarily":
            with quantizer.temporarily(before.model, batches()):
                pass
        else:
            getattr(quantizer, how)(before.model, batches())
    before.is_back()


def test_a_model_and_data_that_were_made_in_inference_mode_are_quantized():
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(64, 32)
    wanted = model(x)
    assert len(QuantizeModule(bits=8, group_size=32).quantize(model, [x]).quantized) == 2
    assert (model(x) - wanted).norm() / wanted.norm() < 0.02
    model(torch.randn(3, 32, requires_grad=True)).sum().backward()


def test_a_weight_that_the_forward_writes_to_while_another_stands_in_for_it_is_back():
    class Writing(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(1.0)
            return super().forward(x)

    model = nn.Sequential(nn.Linear(32, 32), Writing(32, 32), nn.Linear(32, 32))
    weights = [layer.weight for layer in model]
    before = [weight.detach().clone() for weight in weights]
    with QuantizeModule(bits=4, group_size=32).temporarily(model, [torch.randn(64, 32)]):
        pass
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
    assert all(torch.equal(weight, value) for weight, value in zip(weights, before, strict=True))
