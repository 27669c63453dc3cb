"""GPTQTrainerCallback with a finish."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer

from gptq_plugin import Finish, GPTQTrainerCallback, QuantizeModule, load_quantized
from gptq_plugin.errors import CalibrationError

from trainer_runs import SMALL, Untrained, llama, quantized, train

FINISH = {"steps": 8, "learning_rate": 0.02, "tokens_per_step": 64, "held_out": 6, "judgements": 2, "batch_size": 1}


def test_the_trained_model_is_finished_exported_and_logged(tmp_path):
    model = llama()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 10
    callback = GPTQTrainerCallback(QuantizeModule(**{**SMALL, "bits": 2}), tmp_path / "out", finish=Finish(**FINISH))
    trainer = train(model, [callback], tmp_path, learning_rate=0.0)
    record = callback.report.finish
    assert record.kept and record.samples == 17 and record.after < record.before
    assert json.loads((tmp_path / "out/quantization_report.json").read_text())["finish"]["after"] == record.after
    reloaded, ids = load_quantized(tmp_path / "out"), torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert len(quantized(model)) == 7
    logged = {one["step"]: one["gptq/finish/kl"] for one in trainer.state.log_history if "gptq/finish/kl" in one}
    assert logged == {3 + one.step: one.held_out for one in record.curve}


def test_samples_that_users_choose_serve_the_finish_too(tmp_path):
    chosen = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))

    class Chooses(GPTQTrainerCallback):
        def calibration_data(self, train_dataloader):
            return list(chosen)

    callback = Chooses(QuantizeModule(**{**SMALL, "bits": 2}), tmp_path / "out", finish=Finish(**FINISH))
    train(llama(), [callback], tmp_path, learning_rate=0.0)
    calibration, finish = callback.report.calibration, callback.report.finish.data
    assert calibration.partition(" of ")[2] == finish.partition(" of ")[2] and "train" not in finish


def test_a_share_of_the_trainers_loss_is_trained(tmp_path):
    """As `compute_loss` of a subclass gives it; without one, that of the labels."""
    states, finish = [], Finish(**FINISH, task_weight=0.6)
    for given in (True, False):
        model, folder, modes = llama(), tmp_path / str(given), []
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 10

        class Doubles(Trainer):
            def compute_loss(self, model, inputs, **options):
                self.modes.append(model.training)
                return 2 * super().compute_loss(model, inputs, **options)

            def train(self):
                loss = self.compute_loss if self.given else None
                quantizer = QuantizeModule(**{**SMALL, "bits": 2})
                self.add_callback(GPTQTrainerCallback(quantizer, self.folder, finish=finish, task_loss=loss))
                return super().train()

        Doubles.modes, Doubles.given, Doubles.folder = modes, given, folder / "out"
        train(model, [], folder, kind=Doubles, learning_rate=0.0)
        assert given == (False in modes)
        states.append(load_quantized(folder / "out").state_dict())
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    with pytest.raises(ValueError, match="task_loss is the loss of a finish with a task_weight"):
        GPTQTrainerCallback(QuantizeModule(**SMALL), finish=Finish(), task_loss=lambda *_: None)


@pytest.mark.parametrize(
    ("task_loss", "found"),
    [
        (lambda model, batch: None, "NoneType"),
        (lambda model, batch: model(**batch).logits.mean(-1), r"a tensor \[1, 16\]"),
        (lambda model, batch: model(**batch).loss.detach(), r"a tensor \[\]"),
    ],
)
def test_a_task_loss_that_gives_none_is_refused_before_training(task_loss, found, tmp_path):
    callback = GPTQTrainerCallback(
        QuantizeModule(**{**SMALL, "batch_size": 1}), finish=Finish(**FINISH, task_weight=0.5), task_loss=task_loss
    )
    with pytest.raises(CalibrationError, match=f"task_weight=0.5 trains by a loss of every batch.* returned {found}"):
        train(llama(), [callback], tmp_path, kind=Untrained)


def test_too_few_samples_for_a_finish_are_refused_before_training(tmp_path):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), finish=Finish(**{**FINISH, "batch_size": 32}))
    with pytest.raises(CalibrationError, match="there are too few samples in batches of 32: give more samples"):
        train(llama(), [callback], tmp_path, kind=Untrained)
