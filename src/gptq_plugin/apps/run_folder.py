"""One folder for all ranks of a run, also under torchrun and SLURM.

Hydra names a run's folder by the time, and ranks start at different times.

Tested by tests/ranks/test_launchers.py: it takes real launchers to show it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.experimental.callback import Callback
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf, read_write


class OneFolder(Callback):
    """Hydra callback: every rank takes the first one's folder, where it leaves nothing but a log file of its own."""

    def __init__(self) -> None:
        self._store: Any = None  # the first rank's is its process group's too, which comes later: it must not close

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._take(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._take(config, "sweep")

    def _take(self, config: DictConfig, mode: str) -> None:
        environment = _environment()
        if environment is None or environment.world_size() == 1:
            return
        key, rank = f"hydra.{mode}.dir", environment.global_rank()
        os.environ["MASTER_ADDR"] = environment.main_address  # as Lightning does it for its process group
        os.environ["MASTER_PORT"] = str(environment.main_port)
        self._store, *_ = next(dist.rendezvous("env://", rank=rank, world_size=environment.world_size()))
        if rank == 0:
            self._store.set(key, str(Path(OmegaConf.select(config, key)).absolute()))
            return
        folder = self._store.get(key).decode()
        with read_write(config):
            OmegaConf.update(config, key, folder)
            config.hydra.output_subdir = None
            config.hydra.job.name = f"rank{rank}"
            # A sweep composes the config of each of its runs anew, from these.
            config.hydra.overrides.hydra += [
                f"{key}='{folder}'", "hydra.output_subdir=null", f"hydra.job.name=rank{rank}"
            ]  # fmt: skip


def launched() -> int:
    """How many processes this command was started in at once, by torchrun or SLURM."""
    environment = _environment()
    return environment.world_size() if environment else 1


def _environment() -> ClusterEnvironment | None:
    """What started the ranks; None when nobody did, or Lightning itself, which hands its folder on."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            return kind()
    return None
