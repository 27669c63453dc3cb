"""The examples, run as their first lines say."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys

import pytest

from gptq_plugin import QuantLinear, load_quantized

from forked_python import python
from paths import EXAMPLES

_TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_every_example_is_run_here():
    small = {"plain_loop", "fabric", "hf_trainer", "lightning_callback"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == small | {"own_data", "lightning_cli", "lora_recovery"}


def ends_with_an_export_that_loads(printed, out):
    loss = re.search(r"4 bits, reloaded from \S+: loss (\d+\.\d+)", printed)
    assert loss and float(loss[1]) < 5.5, printed  # 6.2 is a guess among 512 tokens
    model = load_quantized(out)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 14 and {layer.bits for layer in layers} == {4}
    assert (out / "tokenizer.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "lightning_callback", "hf_trainer", "fabric"])
def test_an_example_ends_with_an_export_that_loads(name, tmp_path, monkeypatch, capsys):
    """As a script, in this process: what the libraries take to be imported is not paid four times."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "out"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    ends_with_an_export_that_loads(capsys.readouterr().out, tmp_path / "out")


@pytest.mark.slow
def test_adapters_recover_most_of_what_2_bits_lost(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora_recovery.py", "out"])
    runpy.run_path(str(EXAMPLES / "lora_recovery.py"), run_name="__main__")
    found = re.findall(r": loss (\d+\.\d+), KL to the float model (\d+\.\d+)", capsys.readouterr().out)
    (learned, none), (lost, apart), (recovered, left) = [(float(loss), float(kl)) for loss, kl in found]
    assert none == 0 and 0 < left < apart / 2 and learned < recovered < lost
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()
    layers = [one for one in load_quantized(tmp_path / "out").modules() if isinstance(one, QuantLinear)]
    assert len(layers) == 14 and {layer.bits for layer in layers} == {2}


@pytest.mark.slow
def test_lightning_cli_quantizes_by_the_yaml_beside_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_cli.py", "fit", "--config", str(EXAMPLES / "lightning_cli.yaml")])
    runpy.run_path(str(EXAMPLES / "lightning_cli.py"), run_name="__main__")
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["totals"]["samples"] == 64 and report["metrics"]["val_loss"]
    model = load_quantized(tmp_path / "out")
    assert {layer.bits for layer in model.modules() if isinstance(layer, QuantLinear)} == {4}
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "launcher", "arguments"), [("hf_trainer", _TWO, []), ("fabric", [], ["2"])])
def test_an_example_on_two_processes_ends_with_one_export_that_loads(name, launcher, arguments, tmp_path):
    command = [python(), *launcher, EXAMPLES / f"{name}.py", tmp_path / "out", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 bits, reloaded from") == 1
    ends_with_an_export_that_loads(done.stdout, tmp_path / "out")


@pytest.mark.slow
def test_calibrating_on_the_runs_own_data_keeps_more_of_what_was_learned(shared, tmp_path):
    """A code model learns English with LoRA: its own rows against the code it was trained on, as the example has it."""
    files = {
        "model": "models/pycode-29m",
        "train": "data/wikitext-2/test.txt",
        "valid": "data/wikitext-2/valid.txt",
        "generic": "data/pycode/calib.jsonl",
    }
    options = [part for name, file in files.items() for part in (f"--{name}", shared / file)]
    options += ["--out", tmp_path, "--bits", "3", "--samples", "24", "--length", "48", "--steps", "9"]
    command = [python(), EXAMPLES / "own_data.py", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # another test has the other core
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    learned, own, generic = found["3-own"]["float"], found["3-own"]["gptq"], found["3-generic"]["gptq"]
    assert learned < found["before"] - 0.5
    assert learned < own < generic < found["before"]
    assert len(load_quantized(tmp_path / "3-bits-own").model.layers) == 8
