"""Gives all ranks of a run one folder when torchrun or SLURM, instead of Lightning, starts them.

Hydra names a run's folder by the time, and ranks start at different times.
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
    """Hydra callback: every rank uses rank 0's folder, and the others write only a log file there."""

    def __init__(self) -> None:
        self._store: Any = None  # kept open: the process group, which is made later, uses rank 0's store too

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._share_folder(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._share_folder(config, "sweep")

    def _share_folder(self, config: DictConfig, mode: str) -> None:
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
            # A sweep composes the config of each of its runs again, from these.
            config.hydra.overrides.hydra += [
                f"{key}='{folder}'", "hydra.output_subdir=null", f"hydra.job.name=rank{rank}"
            ]  # fmt: skip


def launched() -> int:
    """Number of processes of this command that torchrun or SLURM started."""
    environment = _environment()
    return environment.world_size() if environment else 1


def _environment() -> ClusterEnvironment | None:
    """The environment that started the ranks; None for one process, or if Lightning starts them in its own folder."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            return kind()
    return None
