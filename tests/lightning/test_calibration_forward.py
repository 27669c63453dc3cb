"""How a calibration batch is run: prepared as in training, and through the first thing that takes it."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from gptq_plugin.errors import CalibrationError
from gptq_plugin.lightning.calibration_forward import forward_as_in_training

from lightning_runs import Contains, Holds, llama

IDS = torch.arange(6)[None]


class Quiet(pl.LightningModule):
    """Without a forward."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class WithForward(Quiet):
    def forward(self, features):
        return "forward", features


class WithStep(Quiet):
    def calibration_step(self, batch):
        return "step"


class Scaling(nn.Module):
    def forward(self, x, scale=1):
        self.dtype = x.dtype
        return x * scale


def test_the_step_given_comes_before_the_modules_own_and_that_before_any_forward(trainer):
    module, batch = WithStep(net=Scaling()), {"x": torch.ones(2)}
    run = forward_as_in_training(trainer(), module, module.net, step=lambda pl_module, batch: (pl_module, batch))
    used, given = run(module.net, batch)
    assert used is module and torch.equal(given["x"], batch["x"])
    assert forward_as_in_training(trainer(), module, module.net)(module.net, batch) == "step"


def test_a_mapping_runs_through_the_first_forward_that_takes_its_names(trainer):
    module = WithForward(net=Scaling(), model=llama())
    run = forward_as_in_training(trainer(), module, module.net)
    assert torch.equal(run(module.net, {"x": torch.ones(2), "scale": 3}), 3 * torch.ones(2))
    assert run(module.net, {"features": 5}) == ("forward", 5)
    assert run(module.net, {"input_ids": IDS}).logits.shape == (1, 1, 64)
    assert run(module.net, {"pixels": 7}) == ("forward", {"pixels": 7})  # as a whole, where no names fit


def test_a_tuple_runs_through_the_lightning_module_which_alone_knows_its_parts(trainer):
    module, batch = WithForward(net=Scaling()), (torch.ones(2), torch.zeros(1))
    assert forward_as_in_training(trainer(), module, module.net)(module.net, batch)[0] == "forward"
    bare = Quiet(net=Scaling())
    assert torch.equal(forward_as_in_training(trainer(), bare, bare.net)(bare.net, batch), torch.ones(2))


def test_a_module_without_any_forward_is_told_what_to_add(trainer):
    module = Quiet(net=nn.Linear(2, 2))
    run = forward_as_in_training(trainer(), module, module)
    with pytest.raises(CalibrationError, match=r"Quiet has no forward: give it a method calibration_step\(batch\)"):
        run(module, torch.ones(2))


@pytest.mark.parametrize(("every_logit", "positions"), [(False, 1), (True, 6)])
def test_all_logits_are_computed_only_for_the_output_embedding(every_logit, positions, trainer):
    module = Holds()
    run = forward_as_in_training(trainer(), module, module.model, every_logit=every_logit)
    assert run(module.model, {"input_ids": IDS}).logits.shape[1] == positions


def test_the_modules_preparation_of_a_batch_runs_and_the_trainers_precision_is_used(trainer):
    class Prepares(Holds):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"input_ids": batch["raw"]}

    module = Prepares()
    run = forward_as_in_training(trainer(precision="bf16-mixed"), module, module.model)
    assert run(module.model, {"raw": IDS}).logits.dtype == torch.bfloat16
    halved = Quiet(net=Scaling())
    forward_as_in_training(trainer(precision="bf16-true"), halved, halved.net)(halved.net, {"x": torch.ones(2)})
    assert halved.net.dtype == torch.bfloat16


def test_a_model_deep_inside_is_found(trainer):
    module = Contains()
    run = forward_as_in_training(trainer(), module, module)
    assert run(module, {"input_ids": IDS}).logits.shape == (1, 1, 64)
