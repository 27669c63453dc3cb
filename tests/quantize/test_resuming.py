"""Runs that are broken off and started again: only what was not solved is solved, and the result is the same."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import textwrap

import pytest
import torch
from transformers import Trainer, TrainingArguments

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeModule, load_quantized
from gptq_plugin.quantize import one_pass
from gptq_plugin.quantize.resume_folder import resume_folder

import trainer_runs
from forked_python import python
from lightning_runs import SMALL, Holds, fit, quantized, token_loader
from models import tiny_llama
from paths import SUPPORT

OPTIONS = {"group_size": 32, "clip_ratios": (1.0,)}
BATCHES = [{"input_ids": torch.arange(3 + n, 30 + n)[None]} for n in range(8)]
LAYERS = 28  # of four blocks


class Killed(Exception):
    pass


def run(folder, *, stop_at=None, batches=BATCHES, model=None, overwrite=False, **options):
    def progress(done, total, what):
        if stop_at is not None and done >= stop_at:
            raise Killed

    quantizer = QuantizeModule(**{**OPTIONS, "resume": True, **options})
    model = tiny_llama(num_hidden_layers=4) if model is None else model
    return quantizer.quantize(model, batches, export_dir=folder, progress=progress, overwrite=overwrite)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def counts(report):
    return report.cache["layers_taken"], report.cache["layers_solved"]


def test_a_run_that_is_broken_off_goes_on_behind_the_layers_it_solved(tmp_path):
    folder = tmp_path / "out"
    for stop_at in (10, 21):  # in the second block, and when the third is done
        with pytest.raises(Killed):
            run(folder, stop_at=stop_at)
        assert [path.name for path in tmp_path.iterdir()] == [resume_folder(folder).name]
    kinds = {path.name.partition("-")[0] for path in resume_folder(folder).iterdir()}
    assert kinds == {"stop", "solution"}  # and no Hessian
    assert counts(run(folder)) == (21, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "resume" not in run(tmp_path / "plain", resume=False).cache
    assert weights(folder) == weights(tmp_path / "plain")


@pytest.mark.parametrize("inside_first", [True, False])
def test_layers_are_found_from_another_working_directory(inside_first, tmp_path, monkeypatch):
    """An export that is the working directory is replaced from inside, and layers wait there."""
    folder = tmp_path / "out"
    run(folder, resume=False)
    monkeypatch.chdir(folder if inside_first else tmp_path)
    with pytest.raises(Killed):
        run(folder, stop_at=10, overwrite=True)
    assert (resume_folder(folder).parent == folder) == inside_first
    monkeypatch.chdir(tmp_path if inside_first else folder)
    taken, solved = counts(run(folder, overwrite=True))
    assert taken > 0 and taken + solved == LAYERS
    assert not list(tmp_path.rglob("*.resume"))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from models import tiny_llama
from gptq_plugin import QuantizeModule
def progress(done, total, what):
    if done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
batches = [{"input_ids": torch.arange(3 + n, 30 + n)[None]} for n in range(8)]
quantizer = QuantizeModule(group_size=32, clip_ratios=(1.0,), resume=True)
quantizer.quantize(tiny_llama(num_hidden_layers=4), batches, export_dir=sys.argv[2], progress=progress)
"""


def test_a_kill_at_the_last_block_costs_the_last_block(tmp_path):
    """Of a process that could clear up nothing: the shards it wrote are removed, and the layers it kept are taken."""
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    folder = tmp_path / "runs" / "out"
    command = [python(), script, SUPPORT, folder]
    killed = subprocess.run([*command, "21"], capture_output=True, timeout=200)
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr[-2000:]
    assert len(list(folder.parent.glob(".out.*.partial"))) == 1
    subprocess.run([*command, "1000"], check=True, timeout=200)
    found = json.loads((folder / "quantization_report.json").read_text())["cache"]
    assert (found["layers_taken"], found["layers_solved"]) == (21, 7)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_another_run_takes_nothing_and_a_damaged_layer_is_solved_again(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(Killed):
        run(folder, stop_at=10)
    others = [{"input_ids": batch["input_ids"] + 1} for batch in BATCHES]
    assert counts(run(folder, batches=others)) == (0, LAYERS)
    assert not resume_folder(folder).exists()
    with pytest.raises(Killed):
        run(tmp_path / "two", stop_at=10)
    for path in resume_folder(tmp_path / "two").glob("solution-*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    report = run(tmp_path / "two")
    assert counts(report) == (0, LAYERS) and any("is damaged and was computed again" in d for d in report.deviations)


def test_without_an_export_there_is_nothing_to_keep_layers_beside(tmp_path):
    quantizer = QuantizeModule(**OPTIONS, resume=True)
    with pytest.raises(ValueError, match="resume=True keeps solved layers beside the export, and there is none"):
        quantizer.quantize(tiny_llama(), BATCHES)
    with pytest.raises(ValueError, match="resume=True keeps solved layers beside the export, and there is none"):
        GPTQCallback(quantizer)
    with pytest.raises(ValueError, match="resume must be one of True, False; got 1"):
        QuantizeModule(resume=1)
    QuantizeModule(**OPTIONS, resume=True, cache_dir=tmp_path / "cache").quantize(tiny_llama(), BATCHES)
    assert list((tmp_path / "cache").glob("hessian-*"))  # cache_dir keeps more, and wins


@contextlib.contextmanager
def killed_in_its_fourth_layer(monkeypatch):
    solved, whole = [], one_pass.OnePass._solve

    def solve(self, *args):
        solved.append(0)
        if len(solved) == 4:
            raise Killed
        return whole(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(one_pass.OnePass, "_solve", solve)
        with pytest.raises(Killed):
            yield


def test_a_training_run_that_ends_in_a_broken_off_quantization_goes_on(tmp_path, monkeypatch):
    """The end of a fit is the same again when it is resumed from its last checkpoint; here, when nothing is trained."""

    def callback():
        return GPTQCallback(QuantizeModule(**SMALL, resume=True), tmp_path / "out")

    with killed_in_its_fourth_layer(monkeypatch):
        fit(Holds(), token_loader(), [callback()], tmp_path, max_epochs=0)
    again = callback()
    module = Holds()
    fit(module, token_loader(), [again], tmp_path, max_epochs=0)
    taken, left = counts(again.report)
    assert taken > 0 and taken + left == 7 and len(quantized(load_quantized(tmp_path / "out"))) == 7
    assert not resume_folder(tmp_path / "out").exists()


def test_a_trainer_that_is_resumed_from_its_last_checkpoint_goes_on_with_the_quantization(tmp_path, monkeypatch):
    def trained(**resumed):
        callback = GPTQTrainerCallback(QuantizeModule(**SMALL, resume=True), tmp_path / "out")
        values = {"num_train_epochs": 1, "save_strategy": "epoch", "report_to": [], "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=8, **values)
        trainer = Trainer(trainer_runs.llama(), arguments, train_dataset=trainer_runs.Rows(), callbacks=[callback])
        trainer.train(**resumed)
        return callback.report, trainer.state.global_step

    with killed_in_its_fourth_layer(monkeypatch):
        trained()
    report, steps = trained(resume_from_checkpoint=True)
    taken, left = counts(report)
    assert steps == 3 and taken > 0 and taken + left == 7
    assert len(quantized(load_quantized(tmp_path / "out"))) == 7 and not resume_folder(tmp_path / "out").exists()
