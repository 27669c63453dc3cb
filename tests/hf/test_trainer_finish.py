"""GPTQTrainerCallback with a finish."""

from __future__ import annotations

import json

import torch

from gptq_plugin import Finish, GPTQTrainerCallback, QuantizeModule, load_quantized

from trainer_runs import SMALL, llama, quantized, train

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
