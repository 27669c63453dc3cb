"""The state of a Trainer around quantization, and the weights of a run whose quantization fails."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from gptq_plugin.hf.surroundings import (
    drop_replaced_parameters,
    float_checkpoint,
    progress_like,
    random_state_restored,
    weights_saved_on_failure,
)

from trainer_runs import llama, same


@pytest.fixture
def run(tmp_path):
    """run(step, **options): arguments of a Trainer and its state after so many steps, on rank 0."""

    def make(step=3, best=None, rank=0, **options):
        options = {"use_cpu": True, "report_to": [], **options}
        state = TrainerState(global_step=step, best_model_checkpoint=best, is_world_process_zero=rank == 0)
        return TrainingArguments(str(tmp_path / "run"), **options), state

    return make


def draws():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def test_random_numbers_drawn_in_the_block_do_not_change_those_after_it():
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    expected = draws()
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    with pytest.raises(KeyError), random_state_restored(torch.device("cpu")):
        draws()
        raise KeyError
    assert draws() == expected


def test_the_float_checkpoint_is_the_best_one_or_that_of_the_last_step(run, tmp_path):
    args, state = run()
    assert float_checkpoint(args, state, saved=3) == ""
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    assert float_checkpoint(args, state, saved=2) == ""
    last = tmp_path / "run" / "checkpoint-3"
    last.mkdir()
    assert float_checkpoint(args, state, saved=2) == ""  # an earlier run's in the same folder
    assert float_checkpoint(args, state, saved=3) == str(last)
    args, state = run(best="run/checkpoint-1")  # which was not loaded
    assert float_checkpoint(args, state, saved=3) == str(last)
    options = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    gone, best = (str(tmp_path / "run" / name) for name in ("checkpoint-1", "checkpoint-2"))
    assert float_checkpoint(*run(best=best, **options), saved=3) == best
    assert float_checkpoint(*run(best=gone, **options), saved=3) == str(last)
    assert float_checkpoint(*run(best=gone, **options), saved=2) == ""
    assert float_checkpoint(*run(**options), saved=3) == str(last)


def fail(model, args, state, error=KeyError, saved=0):
    with pytest.raises(error), weights_saved_on_failure(model, args, state, saved):
        raise error


@pytest.mark.parametrize("options", [{"step": 0}, {"rank": 1}])
def test_nothing_is_saved_before_the_first_step_or_by_other_ranks(options, run, tmp_path):
    fail(llama(), *run(**options))
    assert not (tmp_path / "run").exists()


def test_nothing_is_saved_when_nothing_fails_or_a_checkpoint_holds_the_weights(run, tmp_path):
    with weights_saved_on_failure(llama(), *run(), saved=0):
        pass
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    fail(llama(), *run(), saved=3)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]


def test_trained_weights_are_saved_in_the_models_own_format_and_the_log_tells_where(run, tmp_path, caplog):
    model, plain = llama(), nn.Linear(3, 2)
    for _ in range(2):  # also where an earlier run has left its folder
        fail(plain, *run(step=4))
        fail(plain, *run(step=5), error=KeyboardInterrupt)
    for step in (4, 5):
        loaded = torch.load(tmp_path / "run" / f"trained-{step}" / "pytorch_model.bin")
        assert torch.equal(loaded["weight"], plain.weight)
    fail(model, *run())
    folder = tmp_path / "run" / "trained-3"
    assert same(AutoModelForCausalLM.from_pretrained(folder), model) and f"saving them to {folder}" in caplog.text


def test_a_bar_is_shown_on_rank_0_unless_the_trainer_shows_none(run, capsys):
    for options in ({"disable_tqdm": True}, {"rank": 1, "disable_tqdm": False}):
        with progress_like(*run(**options)) as progress:
            assert progress is None
    with progress_like(*run(disable_tqdm=False)) as progress:
        progress(7, 7, "done")
    assert "7/7" in capsys.readouterr().err


def test_the_optimizer_forgets_parameters_that_were_replaced():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    model[1] = nn.Identity()
    drop_replaced_parameters(optimizer, model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
