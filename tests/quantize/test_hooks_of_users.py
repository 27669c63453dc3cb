"""Hooks that users put on layers go on after the quantization, and it is calibrated on what they leave.

8-bit layers without the hooks were 1.9 to 3.5 of the float outputs' norm away from them.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.errors import ExportError
from gptq_plugin.layers.qlinear import QuantLinear

from models import tiny_gpt2, tiny_llama


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))


def scale_output(layer):
    return layer.register_forward_hook(lambda m, args, y: y * 3)


def scale_input(layer):
    return layer.register_forward_pre_hook(lambda m, args: (args[0] * 4,))


def input_by_keyword(layer):
    return layer.register_forward_pre_hook(lambda m, args, kw: ((args[0].flip(-1),), kw), with_kwargs=True)


def low_rank(layer):
    torch.manual_seed(1)
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    return layer.register_forward_hook(lambda m, args, y: y + args[0] @ a.T @ b.T)


def steer_one_row(layer):
    def hook(module, args, kwargs, y):
        y = y.clone()
        y[-1] += 2
        return y

    return layer.register_forward_hook(hook, with_kwargs=True, always_call=True)


def both_sides(layer):
    scale_input(layer)
    return scale_output(layer)


HOOKS = [scale_output, scale_input, input_by_keyword, low_rank, steer_one_row, both_sides]


@pytest.mark.parametrize("register", HOOKS)
def test_a_hook_that_changes_inputs_or_outputs_goes_on(register):
    model, x = net(), torch.randn(256, 64)
    plain = model(x)
    handle = register(model[2])
    wanted = model(x)
    assert (wanted - plain).norm() / wanted.norm() > 0.02
    report = QuantizeModule(bits=8, group_size=32).quantize(model, [x])
    assert len(report.quantized) == 3 and isinstance(model[2], QuantLinear)
    assert (model(x) - wanted).norm() / wanted.norm() < 0.02
    handle.remove()
    hooks = len(model[2]._forward_hooks) + len(model[2]._forward_pre_hooks)
    assert hooks == (1 if register is both_sides else 0)


def test_the_layer_is_calibrated_on_the_input_that_the_hook_leaves():
    """Channels that the hook drops are not in its Hessian: their weights cost nothing, so the others are better."""

    def codes(change, inputs):
        model = nn.Sequential(nn.Linear(64, 32))
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
        change(model[0])
        QuantizeModule(bits=3, group_size=32).quantize(model, [inputs])
        return model[0].qweight

    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    mixed = x.clone()
    mixed[:, 8:] = x[:, 8:] * 0.05 + x[:, :56]
    hooked = codes(lambda layer: layer.register_forward_pre_hook(lambda m, args: (mixed[: len(args[0])],)), x)
    assert torch.equal(hooked, codes(lambda layer: None, mixed))
    assert not torch.equal(hooked, codes(lambda layer: None, x))


def test_a_hook_that_only_looks_sees_every_call_in_order_and_its_layer_is_quantized():
    model, x, seen = net(), torch.randn(256, 64), []
    model[2].register_forward_hook(lambda m, args, y: seen.append((type(m).__name__, args[0].shape, y.shape)))
    model[2].register_full_backward_hook(lambda m, grad_input, grad_output: seen.append(grad_output[0].shape))
    report = QuantizeModule(bits=8, group_size=32).quantize(model, [x])
    assert len(report.quantized) == 3 and not any("hook" in deviation for deviation in report.all_deviations())
    seen.clear()
    model(torch.randn(7, 64, requires_grad=True)).sum().backward()
    assert seen == [("QuantLinear", (7, 64), (7, 64)), (7, 64)]


def test_hooks_that_quantization_needs_are_gone_afterwards_and_the_users_are_there_once():
    model, x = net(), torch.randn(256, 64)
    for register in HOOKS:
        register(model[2])
    before = [dict(model[2]._forward_hooks), dict(model[2]._forward_pre_hooks)]
    QuantizeModule(bits=8, group_size=32).quantize(model, [x])
    assert [dict(model[2]._forward_hooks), dict(model[2]._forward_pre_hooks)] == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in (model, model[0], model[1], model[4]))


def test_a_float_layer_has_its_hooks_again_after_temporarily():
    model, x = net(), torch.randn(256, 64)
    handle = scale_output(model[2])
    wanted = model(x)
    with QuantizeModule(bits=8, group_size=32).temporarily(model, [x]):
        assert (model(x) - wanted).norm() / wanted.norm() < 0.02
        inside = model[2].register_forward_hook(lambda m, args, y: y * 0)
        assert not (model(x) - model[4].bias).any()
        inside.remove()
    assert torch.equal(model(x), wanted)
    handle.remove()
    assert not model[2]._forward_hooks


def test_a_hook_of_conv1d_and_of_a_whole_layer_in_transformers_models():
    for model, name in ((tiny_gpt2(), "transformer.h.1.mlp.c_fc"), (tiny_llama(), "model.layers.1.mlp.up_proj")):
        ids = [torch.randint(4, 128, (1, 48)) for _ in range(8)]
        scale_output(model.get_submodule(name))
        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(lambda m, args, y: y * 2)
        wanted = model(ids[0]).logits
        report = QuantizeModule(bits=8, group_size=32).quantize(model, ids)
        assert isinstance(model.get_submodule(name), QuantLinear) and len(report.quantized) > 7
        assert (model(ids[0]).logits - wanted).norm() / wanted.norm() < 0.02


def test_a_plain_modules_export_is_loaded_into_a_module_with_its_hooks(tmp_path):
    model, x = net(), torch.randn(256, 64)
    scale_output(model[2])
    QuantizeModule(bits=8, group_size=32).quantize(model, [x], export_dir=tmp_path / "out")
    again = net()
    scale_output(again[2])
    again = load_quantized(tmp_path / "out", model=again)
    assert isinstance(again[2], QuantLinear) and torch.allclose(again(x), model(x), atol=1e-5)


def test_an_export_that_would_lack_a_hook_that_changes_outputs_is_refused(tmp_path):
    model = tiny_llama()
    scale_output(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ExportError, match=r"hooks on model\.layers\.0\.mlp\.up_proj"):
        QuantizeModule(bits=8, group_size=32).quantize(
            model, [torch.randint(4, 128, (1, 48)) for _ in range(8)], export_dir=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
