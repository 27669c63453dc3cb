"""Quantized layers in the model's tree and in its configuration."""

from __future__ import annotations

import pytest
import torch
from plans import CONFIG, plan_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.plan import planned
from gptq_plugin.model.structure import Structure
from gptq_plugin.quantize.in_place import describe, swapped

from models import tiny_llama


class Holder(nn.Module):
    """Not a transformers model, and holds one."""

    def __init__(self):
        super().__init__()
        self.net = tiny_llama(num_hidden_layers=1)
        self.probe = nn.Linear(64, 32)


def rounded(plan, *but):
    return {
        target.name: QuantLinear.from_quantized(round_to_nearest(target.weight, target.config), target.bias)
        for target in plan.targets
        if target.name not in but
    }


@pytest.mark.parametrize("keeps", [False, True])
def test_layers_are_quantized_inside_the_block_and_float_after_it_unless_they_are_kept(keeps):
    model = tiny_llama(num_hidden_layers=1)
    plan, name = plan_of(model), "model.layers.0.mlp.up_proj"
    floats, layers = dict(model.named_modules()), rounded(plan_of(model), name)
    with swapped(plan, layers) as keep:
        assert all(model.get_submodule(n) is layer for n, layer in layers.items())
        assert model.get_submodule(name) is floats[name]  # a target that stayed float
        assert model.config.quantization_config["bits"] == 4
        if keeps:
            keep()
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), QuantLinear) == keeps
    assert hasattr(model.config, "quantization_config") == keeps
    if not keeps:
        assert dict(model.named_modules()) == floats


def test_a_failure_in_the_block_brings_the_float_layers_back_even_if_they_were_to_be_kept_later():
    model = tiny_llama(num_hidden_layers=1)
    floats, plan = dict(model.named_modules()), plan_of(model)
    with pytest.raises(RuntimeError, match="enough"), swapped(plan, rounded(plan)):
        raise RuntimeError("enough")
    assert dict(model.named_modules()) == floats and not hasattr(model.config, "quantization_config")


def test_experts_that_stayed_float_may_be_fused_again_in_the_block():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    floats = dict(model.named_parameters())
    with planned(model, CONFIG) as plan:
        layers = {name: layer for name, layer in rounded(plan).items() if "experts" not in name}
        with swapped(plan, layers):
            plan.fuse()
            assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)
    after = dict(model.named_parameters())
    assert after.keys() == floats.keys() and all(after[name] is floats[name] for name in floats)


def test_a_transformers_model_inside_another_module_is_described_by_its_own_names():
    model = Holder()
    plan = plan_of(model)
    layers = rounded(plan, "net.model.layers.0.mlp.up_proj")
    with swapped(plan, layers):
        described = model.net.config.quantization_config
    assert described["checkpoint_format"] == "gptq_v2"  # true zeros, whatever the export's format
    assert CONFIG.checkpoint_format == "gptq"
    kept = described["modules_in_block_to_quantize"][0]
    assert "mlp.down_proj" in kept and "mlp.up_proj" not in kept
    assert [rule for rule in described["dynamic"] if rule.startswith("-:")]
    assert "probe" not in str(described)


def test_a_model_without_quantized_layers_has_no_description():
    model = tiny_llama(num_hidden_layers=1)
    model.config.quantization_config = {"bits": 4}
    describe(Structure.of(model), {}, CONFIG)
    assert not hasattr(model.config, "quantization_config")
    describe(Structure.of(model), {}, CONFIG)  # nothing to take away
    plain = nn.Sequential(nn.Linear(32, 32))
    describe(Structure.of(plain), rounded(plan_of(plain)), CONFIG)  # no configuration to describe it in


def test_what_save_pretrained_writes_of_swapped_layers_is_what_the_memory_holds(tmp_path):
    from gptq_plugin import load_quantized

    model = tiny_llama(num_hidden_layers=1)
    plan, ids = plan_of(model), torch.arange(12)[None]
    with swapped(plan, rounded(plan)), torch.no_grad():
        model.save_pretrained(tmp_path)
        expected = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(load_quantized(tmp_path)(ids).logits, expected)
