"""What precedes the pass, in an order that uses data last."""

from __future__ import annotations

import pytest
import torch
from plans import CONFIG, plan_of, rows
from torch import Tensor, nn
from torch.nn import functional

from gptq_plugin.clients.client import Client
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError, ExportError, TargetError
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.prepare import check_client, prepared

from models import tiny_llama


class Undeclared(nn.Module):
    """Experts in one parameter, and nothing that tells how it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 64, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([functional.linear(x[e::3], self.weights[e]).sum(0) for e in range(3)])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.experts = Undeclared()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(self.before(x))
        return y


def untouched():
    raise AssertionError("no batch was to be asked for")
    yield


def names(plan):
    return [target.name for target in plan.targets]


def test_the_plan_and_the_batches_are_those_of_the_model_and_the_options():
    model = nn.Sequential(nn.Linear(32, 32))
    with prepared(model, [rows(4, 32), rows(4, 32)], CONFIG, PassOptions(nsamples=4)) as (plan, calibration):
        assert names(plan) == ["0"] and plan.config is CONFIG
        assert calibration.samples == 4
    with prepared(model, [rows(1, 32)] * 40, CONFIG, PassOptions()) as (_, calibration):
        assert calibration.samples == CONFIG.nsamples


@pytest.mark.parametrize(
    ("config", "client", "error", "message"),
    [
        (QuantizeConfig(dynamic={"nowhere": {"bits": 8}}), None, TargetError, "matches none"),
        (QuantizeConfig(group_size=32, sym=False), Client("vllm"), ExportError, "sym=True only"),
    ],
)
def test_what_cannot_work_is_refused_before_any_data_is_used(config, client, error, message):
    model = tiny_llama()
    before = dict(model.named_modules())
    with (
        pytest.raises(error, match=message),
        prepared(model, untouched(), config, PassOptions(), client),
    ):
        pass
    assert dict(model.named_modules()) == before


def test_a_model_that_does_not_tell_how_it_uses_its_experts_is_planned_after_a_batch_ran():
    model, x = Block(), rows(30, 32)
    assert names(plan_of(model)) == ["before"]
    ran = []
    forward = lambda network, batch: ran.append(network.training) or network(batch)  # noqa: E731
    once = iter([x])  # data that can be read once
    with prepared(model.train(), once, CONFIG, PassOptions(forward=forward)) as (plan, calibration):
        assert names(plan)[1:] == [f"experts.{e}.weights" for e in range(3)]
        assert ran == [False] and calibration.samples == 30
    assert isinstance(model.experts.weights, nn.Parameter) and model.training
    dynamic = {r"experts\.": {"bits": 8}}  # names that are known only then
    with prepared(model, [x], QuantizeConfig(group_size=16, dynamic=dynamic), PassOptions()) as (plan, _):
        assert [target.config.bits for target in plan.targets] == [4, 8, 8, 8]


def test_such_a_model_is_refused_before_data_is_used_if_a_client_would_not_take_it():
    with (
        pytest.raises(ExportError, match="vllm loads transformers models"),
        prepared(Block(), untouched(), CONFIG, PassOptions(), Client("vllm")),
    ):
        pass


def test_such_a_model_without_data_is_planned_as_it_is():
    class Unseen(Undeclared):
        pass

    model = Block()
    model.experts = Unseen()
    with prepared(model, [], CONFIG, PassOptions()) as (plan, calibration):
        assert names(plan) == ["before"] and calibration.samples == 0


def test_data_that_cannot_be_read_leaves_the_experts_together():
    model = tiny_llama()
    before = dict(model.named_modules())
    with pytest.raises(CalibrationError, match="no tokenizer"), prepared(model, ["text"], CONFIG, PassOptions()):
        pass
    assert dict(model.named_modules()) == before


def test_a_client_is_asked_about_the_plan_and_none_is_asked_nothing():
    model = tiny_llama()
    check_client(model, QuantizeConfig(dynamic={"nowhere": {"bits": 8}}), None)  # not even planned
    check_client(model, QuantizeConfig(group_size=32), Client("vllm"))
    with pytest.raises(ExportError, match="4 and 8 bits only"):
        check_client(model, QuantizeConfig(bits=3, group_size=32), Client("vllm"))
