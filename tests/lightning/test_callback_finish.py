"""GPTQCallback with a finish: on one process and on two, its logs, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from gptq_plugin import Finish, GPTQCallback, QuantizeModule, load_quantized
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.lightning import strategies
from gptq_plugin.lightning.strategies import refuse_for_shards

from forked_python import python
from lightning_runs import FINISH, FINISH_RUN, SMALL, Plain, Structured, fit, pair_loader, quantized, token_loader
from paths import SUPPORT

TWO_BITS = {**SMALL, "bits": 2}


@pytest.mark.parametrize("swap", [True, False])
def test_the_result_is_finished_on_the_runs_own_samples_exported_and_logged(swap, tmp_path):
    module = Structured()
    logger = CSVLogger(tmp_path, name="logs")
    callback = GPTQCallback(QuantizeModule(**TWO_BITS), tmp_path / "out", swap=swap, finish=Finish(**FINISH))
    trainer = fit(module, token_loader(), [callback], tmp_path, logger=logger)
    record = callback.report.finish
    assert record.kept and record.samples == 16 and record.held_out_tokens == 8 * 16
    assert "samples of the train dataloader's 24" in record.data
    exported = load_quantized(tmp_path / "out")
    told = json.loads((tmp_path / "out/quantization_report.json").read_text())["finish"]
    assert told["kept"] and told["after"] == record.after < record.before
    with torch.no_grad():
        ids = torch.arange(16)[None]
        outputs = [model.eval()(input_ids=ids).logits for model in (exported, module.model)]
    assert torch.allclose(*outputs, atol=1e-4) == swap and bool(quantized(module)) == swap
    assert (exported.model.norm.weight == module.model.model.norm.weight).all() == swap
    lines = list(csv.DictReader((tmp_path / "logs/version_0/metrics.csv").open()))
    logged = {int(line["step"]): float(line["gptq/finish/kl"]) for line in lines if line.get("gptq/finish/kl")}
    first = trainer.global_step
    assert logged == {first + one.step: pytest.approx(one.held_out) for one in record.curve}


def test_a_share_of_the_training_steps_loss_is_trained_and_nothing_is_logged(tmp_path):
    """The step counts its calls in the finish, where the trainer has no loop to log to."""

    class Counts(Structured):
        calls = 0

        def training_step(self, batch):
            self.calls += self.trainer.state.stage is None or not self.training
            loss = super().training_step(batch, 0)
            return {"loss": loss, "other": torch.zeros(2)}

    states = []
    for weight in (0.0, 0.6):
        module, folder = Counts(), tmp_path / str(weight)
        logger = CSVLogger(folder, name="logs")
        finish = Finish(**FINISH, task_weight=weight)
        callback = GPTQCallback(QuantizeModule(**TWO_BITS), folder / "out", finish=finish)
        fit(module, token_loader(), [callback], folder, logger=logger, log_every_n_steps=1)
        assert callback.report.finish.kept and callback.report.finish.options["task_weight"] == weight
        assert bool(module.calls) == bool(weight) and "log" not in vars(module)
        lines = list(csv.DictReader((folder / "logs/version_0/metrics.csv").open()))
        assert len([line for line in lines if line["train_loss"]]) == 3  # those of training
        states.append(load_quantized(folder / "out").state_dict())
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def draws(self, dataloader_iter):
    """A training_step."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: setattr(module, "automatic_optimization", False), "Structured optimizes by itself"),
        (lambda module: setattr(module, "training_step", draws.__get__(module)), "Structured draws its batches by"),
    ],
)
def test_training_steps_without_a_loss_of_a_batch_are_refused_before_training(change, message, tmp_path):
    module = Structured()
    change(module)
    finish = Finish(**FINISH, task_weight=0.5)
    with pytest.raises(ValueError, match=f"{message}.*leave task_weight out"):
        fit(module, token_loader(), [GPTQCallback(QuantizeModule(**SMALL), finish=finish)], tmp_path)


def test_training_steps_that_return_none_are_refused_behind_the_first(tmp_path):
    class Silent(Structured):
        steps = 0

        def training_step(self, batch, batch_idx):
            self.steps += 1

    callback = GPTQCallback(QuantizeModule(**SMALL), finish=Finish(**FINISH, task_weight=0.5))
    for _ in range(2):
        module = Silent()
        with pytest.raises(CalibrationError, match=r"=0.5 trains by a loss of every batch.*returned NoneType"):
            fit(module, token_loader(), [callback], tmp_path)
        assert module.steps == 1
    fit(module, token_loader(), [GPTQCallback(QuantizeModule(**SMALL), finish=Finish(**FINISH))], tmp_path)
    assert module.steps == 4  # no loss is asked for


def test_a_first_batch_of_none_is_no_step_without_a_loss(tmp_path):
    """Lightning leaves it out."""

    class Skips(torch.utils.data.DataLoader):
        def __iter__(self):
            yield None
            yield from super().__iter__()

    callback = GPTQCallback(QuantizeModule(**SMALL), finish=Finish(**FINISH, task_weight=0.5))
    fit(Structured(), Skips(token_loader().dataset, batch_size=8), [callback], tmp_path)
    assert callback.report.finish.options["task_weight"] == 0.5


def test_a_module_that_predicts_no_distribution_is_refused_before_training(tmp_path):
    module = Plain()
    module.training_step = lambda *_: pytest.fail("trained")
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", finish=Finish(**FINISH))
    with pytest.raises(TargetError, match="holds none of them: leave the finish out"):
        fit(module, pair_loader(), [callback], tmp_path)


def test_a_module_without_blocks_is_refused_before_training_where_blocks_are_to_be_trained(tmp_path):
    module = Structured()
    module.model.model.layers = torch.nn.Sequential(*module.model.model.layers)
    module.training_step = lambda *_: pytest.fail("trained")
    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", finish=Finish("blocks", **FINISH))
    with pytest.raises(TargetError, match="has no list of blocks with linear layers.*kind='scales'"):
        fit(module, token_loader(), [callback], tmp_path)


def test_a_finish_that_is_none_is_refused_where_the_callback_is_made():
    with pytest.raises(ValueError, match="finish must be a Finish"):
        GPTQCallback(QuantizeModule(**SMALL), finish={"kind": "scales"})


def test_samples_that_users_choose_serve_the_finish_too(tmp_path):
    chosen = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))

    class Chooses(GPTQCallback):
        def calibration_data(self, trainer):
            return list(chosen)

    callback = Chooses(QuantizeModule(**TWO_BITS), tmp_path / "out", finish=Finish(**FINISH))
    fit(Structured(), token_loader(), [callback], tmp_path)
    calibration, finish = callback.report.calibration, callback.report.finish.data
    assert calibration.partition(" of ")[2] == finish.partition(" of ")[2] and "train" not in finish
    assert callback.data is not callback.finish_data


def test_sharded_strategies_are_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(strategies, "is_sharded", lambda trainer: True)
    trainer = SimpleNamespace(strategy=object())
    with pytest.raises(ValueError, match=r"gptq-quantize ckpt=... finish=scales .*, or train with strategy='ddp'"):
        refuse_for_shards(trainer, None, tmp_path, "last", Finish())
    refuse_for_shards(trainer, None, tmp_path, "last", Finish(kind="none"))


def test_a_generator_of_samples_serves_calibration_and_finish(tmp_path):
    ids = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
    callback = GPTQCallback(
        QuantizeModule(**TWO_BITS), tmp_path / "out", calibration=(row for row in ids), finish=Finish(**FINISH)
    )
    fit(Structured(), token_loader(), [callback], tmp_path)
    assert callback.report.samples == 16 and callback.report.finish.samples == 16


def start(folder, *arguments):
    (folder / "train.py").write_text(FINISH_RUN)
    command = [python(), "train.py", str(SUPPORT), str(folder), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def test_too_few_samples_for_a_finish_are_refused_before_training(tmp_path):
    class Untrained(Structured):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training has begun")

    callback = GPTQCallback(QuantizeModule(**TWO_BITS), finish=Finish(**{**FINISH, "batch_size": 32}))
    with pytest.raises(CalibrationError, match="there are too few samples in batches of 32: give more samples"):
        fit(Untrained(), token_loader(), [callback], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scales", "full"])
def test_two_ranks_have_the_same_bytes_in_the_end(kind, tmp_path):
    process = start(tmp_path, 2, "nowhere", kind)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text())["finish"] for rank in (0, 1)]
    assert reports[0]["curve"] == reports[1]["curve"] and reports[0]["kept"]
    assert reports[0]["samples"] == 16 and reports[0]["held_out_tokens"] == 8 * 16
    assert reports[0]["blocks"] == reports[1]["blocks"] and len(reports[0]["blocks"]) == (kind == "full")
    exported = load_quantized(tmp_path / "export").state_dict()
    learned = [name for name in exported if name.endswith(("scales", "qweight"))]
    assert learned and all(torch.equal(exported[name], first[f"model.{name}"]) for name in learned)


@pytest.mark.slow
def test_two_ranks_train_a_share_of_the_loss_of_a_step_that_returns_a_dict_and_logs_over_ranks(tmp_path):
    states = {}
    for place in ("odd", "nowhere"):
        (tmp_path / place).mkdir()
        process = start(tmp_path / place, 2, place, "full")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        first, second = (torch.load(tmp_path / place / f"rank{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)
        states[place] = first
    reports = [json.loads((tmp_path / f"odd/rank{rank}.json").read_text())["finish"] for rank in (0, 1)]
    assert reports[0]["curve"] == reports[1]["curve"] and reports[0]["kept"]
    assert reports[0]["options"]["task_weight"] == 0.6
    assert any(not torch.equal(states["odd"][key], states["nowhere"][key]) for key in states["odd"])


@pytest.mark.slow
def test_a_step_that_returns_no_loss_on_one_rank_ends_both_and_leaves_the_export_of_gptq(tmp_path):
    process = start(tmp_path, 2, "missing", "scales")
    _, errors = process.communicate(timeout=300)
    assert process.returncode and "returned NoneType" in errors
    assert len(quantized(load_quantized(tmp_path / "export"))) == 7
    assert json.loads((tmp_path / "export/quantization_report.json").read_text())["finish"] is None


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("place", ["teacher", "solve", "block", "step", "export"])
def test_a_run_that_is_killed_in_its_finish_leaves_the_export_of_gptq(place, ranks, tmp_path):
    """Of two ranks, the second may be killed first, which ends the first one with an error."""
    process = start(tmp_path, ranks, place, "blocks" if place in ("solve", "block") else "scales")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL or (ranks == 2 and process.returncode)
    model = load_quantized(tmp_path / "export")
    assert len(quantized(model)) == 7
    assert json.loads((tmp_path / "export/quantization_report.json").read_text())["finish"] is None
    assert [one for one in os.listdir(tmp_path) if one.startswith("export")] == ["export"]
