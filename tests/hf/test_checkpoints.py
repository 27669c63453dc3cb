"""What the callback knows of its training's checkpoints, in real runs of transformers.Trainer."""

from __future__ import annotations

import signal

import pytest
from transformers import TrainerCallback

from gptq_plugin import GPTQTrainerCallback, QuantizeModule

from trainer_runs import SMALL, llama, quantized, train


@pytest.mark.parametrize("where", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
def test_a_run_that_sigterm_ended_is_quantized_only_once_it_is_resumed(where, tmp_path, caplog):
    pytest.importorskip("transformers.trainer_jit_checkpoint")

    def request(self, args, state, control, **training):
        if state.global_step == 1:
            manager = signal.getsignal(signal.SIGTERM).__self__
            manager.is_checkpoint_requested = True  # what the signal does, after three seconds

    preempting = type("Preempting", (TrainerCallback,), {where: request})()
    options = {"enable_jit_checkpoint": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    model, callback = llama(), GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out")
    trainer = train(model, [preempting, callback], tmp_path, **options)
    assert trainer.state.global_step < 4 and callback.report is None and quantized(model) == []
    assert not (tmp_path / "out").exists() and "nothing is quantized until it is resumed" in caplog.text
    trainer.remove_callback(preempting)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and len(quantized(model)) == 7
    assert callback.report.float_checkpoint.endswith("checkpoint-4")


@pytest.mark.parametrize("save", ["steps", "no"])
def test_a_run_that_others_stop_early_is_quantized(save, tmp_path):
    """Also where an earlier run left a checkpoint of that step, and this one writes none."""
    pytest.importorskip("transformers.trainer_jit_checkpoint")
    train(llama(), [], tmp_path, max_steps=1, save_strategy="steps", save_steps=1)

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **training):
            control.should_training_stop = True

    callback = GPTQTrainerCallback(QuantizeModule(**SMALL))
    train(llama(), [Stops(), callback], tmp_path, enable_jit_checkpoint=True, save_strategy=save, save_steps=1)
    assert len(callback.report.quantized) == 7
    assert callback.report.float_checkpoint[-12:] == ("checkpoint-1" if save == "steps" else "")
