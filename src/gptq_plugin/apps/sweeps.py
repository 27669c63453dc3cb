"""Runs of a sweep (``-m``) that train on several processes, each as a separate command.

Lightning starts the other ranks with the command line of the process. In a sweep that is the command of the whole
sweep, so every rank but the first would start the sweep again, in another folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Trainer
from omegaconf import OmegaConf

from gptq_plugin.apps.summary import SUMMARY


def runs_a_sweep() -> bool:
    """Returns whether this process goes through the runs of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def in_sweep() -> bool:
    """Returns whether this run belongs to a sweep, in any process: then it has a number."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def starts_ranks(trainer: Trainer) -> bool:
    """Returns whether fitting starts the other ranks, with the command line of this process."""
    launcher: Any = trainer.strategy.launcher
    environment = getattr(launcher, "cluster_environment", None)
    return trainer.num_devices > 1 and environment is not None and not environment.creates_processes_externally


def run_alone(folder: Path) -> float | None:
    """Runs this run of a sweep as a separate command in `folder`; returns the exported model's mean NLL.

    Raises:
        RuntimeError: The command failed.
    """
    done = subprocess.run(_command(folder), cwd=HydraConfig.get().runtime.cwd, check=False)
    if done.returncode:
        raise RuntimeError(f"the run in {folder} failed (exit status {done.returncode}): see its output above")
    nll: dict[str, float] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["nll"]
    return nll.get("gptq")


def _command(folder: Path) -> list[str]:
    hydra = HydraConfig.get()
    command = [sys.executable, "-m", "gptq_plugin.apps.cli"]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            command.append(f"--config-dir={source.path}")
    command.append(f"--config-name={hydra.job.config_name}")
    command += [override for override in hydra.overrides.hydra if not override.startswith("hydra.mode=")]
    return [
        *command,
        *hydra.overrides.task,
        "hydra.mode=RUN",
        f"hydra.run.dir='{folder}'",
        f"hydra.job.num={hydra.job.num}",
    ]
