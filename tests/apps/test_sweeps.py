"""Runs of a sweep as separate commands; tests/ranks/test_launchers.py runs whole sweeps of several ranks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Trainer
from omegaconf import OmegaConf

from gptq_plugin.apps import sweeps
from gptq_plugin.apps.summary import SUMMARY


@pytest.fixture
def hydra(tmp_path):
    """hydra(*overrides, KEY=VALUE): sets Hydra's configuration of a run of gptq-finetune."""

    def configure(*overrides, **noted):
        with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
            cfg = compose("finetune", [*overrides, "hydra.job.config_name=finetune"], return_hydra_config=True)
        for key, value in ({"runtime__cwd": str(tmp_path)} | noted).items():
            OmegaConf.update(cfg.hydra, key.replace("__", "."), value)
        HydraConfig.instance().set_config(cfg)

    yield configure
    HydraConfig.instance().cfg = None


def test_a_run_of_a_sweep_has_a_number_and_its_process_the_mode(hydra):
    hydra()
    assert not sweeps.in_sweep() and not sweeps.runs_a_sweep()
    hydra("hydra.job.num=3")
    assert sweeps.in_sweep() and not sweeps.runs_a_sweep()  # a separate command of the sweep
    hydra("hydra.job.num=3", mode=RunMode.MULTIRUN)
    assert sweeps.in_sweep() and sweeps.runs_a_sweep()


def trainer(**options):
    return Trainer(accelerator="cpu", logger=False, barebones=True, **options)


def test_only_several_devices_that_lightning_launches_itself_start_ranks(monkeypatch):
    assert not sweeps.starts_ranks(trainer())
    several = trainer(devices=2, strategy="ddp")
    several.strategy._configure_launcher()
    assert sweeps.starts_ranks(several)
    spawned = trainer(devices=2, strategy="ddp_spawn")  # processes of a function, not of a command line
    spawned.strategy._configure_launcher()
    assert not sweeps.starts_ranks(spawned)
    environment = {"LOCAL_RANK": "0", "RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1"}
    for name, value in {**environment, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    launched = trainer(devices=2, strategy="ddp")
    launched.strategy._configure_launcher()
    assert not sweeps.starts_ranks(launched)


def test_the_separate_command_repeats_the_runs_overrides_in_its_folder(hydra, tmp_path, monkeypatch):
    own = {"overrides__task": ["quantizer.bits=3"], "overrides__hydra": ["hydra.mode=MULTIRUN", "hydra.verbose=true"]}
    hydra("hydra.job.num=3", **own)
    calls = []

    def run(command, cwd, check):
        calls.append((command, cwd))
        (tmp_path / "3" / SUMMARY).write_text(json.dumps({"nll": {"gptq": 1.5}, "gptq_bytes": 9}))
        return subprocess.CompletedProcess(command, 0)

    (tmp_path / "3").mkdir()
    monkeypatch.setattr(subprocess, "run", run)
    assert sweeps.run_alone(tmp_path / "3") == 1.5
    command = [sys.executable, "-m", "gptq_plugin.apps.cli", "--config-name=finetune", "hydra.verbose=true",
               "quantizer.bits=3", "hydra.mode=RUN", f"hydra.run.dir='{tmp_path}/3'", "hydra.job.num=3"]  # fmt: skip
    assert calls == [(command, str(tmp_path))]


def test_a_users_folder_of_configurations_is_passed_on(hydra, tmp_path):
    packaged = {"path": "gptq_plugin.conf", "schema": "pkg", "provider": "main"}
    own = {"path": "/my/conf", "schema": "file", "provider": "command-line"}
    hydra("hydra.job.num=0", runtime__config_sources=[packaged, own])
    assert "--config-dir=/my/conf" in sweeps._command(tmp_path)
    assert sum(part.startswith("--config-dir") for part in sweeps._command(tmp_path)) == 1


def test_a_command_that_fails_ends_the_sweep(hydra, tmp_path, monkeypatch):
    hydra("hydra.job.num=3")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 7))
    with pytest.raises(RuntimeError, match=r"the run in .*/3 failed \(exit status 7\): see its output above"):
        sweeps.run_alone(tmp_path / "3")


def test_a_run_returns_its_loss_or_with_two_directions_also_its_bytes(hydra):
    assert sweeps.objective(1.5, 10) == 1.5 and sweeps.objective(None, 10) is None  # outside of Hydra
    hydra()
    assert sweeps.objective(1.5, 10) == 1.5  # the sweeper of Hydra itself has no direction
    hydra("+hydra.sweeper.direction=minimize")
    assert sweeps.objective(1.5, 10) == 1.5
    hydra("+hydra.sweeper.direction=[minimize,minimize]")
    assert sweeps.objective(1.5, 10) == (1.5, 10.0)
    sweeps.check_objectives(True)
    with pytest.raises(ValueError, match="leave evaluate=true"):
        sweeps.check_objectives(False)


def test_directions_for_other_numbers_are_refused_before_the_work(hydra):
    hydra("+hydra.sweeper.direction=[minimize,minimize,maximize]")
    with pytest.raises(ValueError, match="has 3 entries"):
        sweeps.check_objectives(True)
