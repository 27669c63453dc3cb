"""A plan of a quantization: its targets, what stays float, and other configurations for the same model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.errors import TargetError
from gptq_plugin.model import plan as plans
from gptq_plugin.model.experts import ExpertLinear
from gptq_plugin.model.plan import planned


def mixtral():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


CONFIG = QuantizeConfig(group_size=32)


def test_experts_are_apart_inside_the_block_and_together_after_it():
    model = mixtral()
    before = set(model.state_dict())
    with planned(model, CONFIG) as plan:
        apart = [target for target in plan.targets if isinstance(target.module, ExpertLinear)]
        assert len(apart) == 9 and plan.model is model and plan.config is CONFIG
        assert [skip.name for skip in plan.skipped] == ["lm_head"]
        plan.fuse()
        assert set(model.state_dict()) == before
    assert set(model.state_dict()) == before


def test_another_configuration_is_planned_without_looking_at_the_model_again(monkeypatch):
    model = mixtral()
    with planned(model, CONFIG) as plan:
        monkeypatch.setattr(plans.Structure, "of", lambda model: pytest.fail("the model was looked at again"))
        other = plan.with_config(QuantizeConfig(bits=8, group_size=16, lm_head=True))
        assert other.structure is plan.structure and other.fuse is plan.fuse
        assert {target.config.bits for target in other.targets} == {8}
        assert len(other.targets) == len(plan.targets) + 1 and not other.skipped
        with pytest.raises(TargetError, match="matches none"):
            plan.with_config(QuantizeConfig(dynamic={"nowhere": {"bits": 8}}))


def test_a_configuration_that_cannot_hold_leaves_the_experts_together():
    model = mixtral()
    before = set(model.state_dict())
    with pytest.raises(TargetError), planned(model, QuantizeConfig(dynamic={"nowhere": {"bits": 8}})):
        pass
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("script", [torch.jit.script, lambda part: torch.jit.trace(part, torch.zeros(2, 64))])
def test_a_model_with_a_part_that_is_torchscript_is_refused_by_its_name(script):
    part = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model = nn.Sequential(nn.Linear(64, 64), script(part))
    for refused in (QuantizeModule(group_size=32).check, QuantizeModule(group_size=32).coverage):
        with pytest.raises(
            TargetError, match="1, 1.0, 1.1 are compiled by TorchScript, .* script the model afterwards"
        ):
            refused(model)
    assert len(QuantizeModule(group_size=32).check(nn.Sequential(model[0], part))[0]) == 2
