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
from omegaconf import ListConfig, OmegaConf

from gptq_plugin.apps.summary import SUMMARY

Objective = float | tuple[float, float] | None


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


def objectives() -> int:
    """Returns how many numbers the sweeper minimizes or maximizes: two if its `direction` is a list, else one.

    Raises:
        ValueError: A list of another length.
    """
    sweeper = HydraConfig.get().sweeper if HydraConfig.initialized() else {}
    direction = sweeper.get("direction")
    if not isinstance(direction, ListConfig):
        return 1
    if len(direction) != 2:
        raise ValueError(
            f"hydra.sweeper.direction has {len(direction)} entries: give one word for the loss, or two in a list, for "
            "the loss and the bytes of the weights"
        )
    return 2


def check_objectives(evaluate: bool) -> None:
    """Refuses, before the work, a sweep that asks for other numbers than a run returns.

    Raises:
        ValueError: Nothing is evaluated, or see `objectives`.
    """
    if objectives() == 2 and not evaluate:
        raise ValueError("hydra.sweeper.direction is a list, so runs return NLL and bytes: leave evaluate=true")


def objective(nll: float | None, stored_bytes: int) -> Objective:
    """What a sweeper gets of a run: the exported model's mean NLL, and with two directions also its bytes."""
    return nll if nll is None or objectives() == 1 else (nll, float(stored_bytes))


def run_alone(folder: Path) -> Objective:
    """Runs this run of a sweep as a separate command in `folder`; returns its `objective`.

    Raises:
        RuntimeError: The command failed.
    """
    done = subprocess.run(_command(folder), cwd=HydraConfig.get().runtime.cwd, check=False)
    if done.returncode:
        raise RuntimeError(f"the run in {folder} failed (exit status {done.returncode}): see its output above")
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return objective(summary["nll"].get("gptq"), summary["gptq_bytes"])


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
