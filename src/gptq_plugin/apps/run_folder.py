"""Gives all ranks of a run one folder when torchrun or SLURM, instead of Lightning, starts them.

Hydra names a run's folder by the time, and ranks start at different times.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf, read_write

from gptq_plugin.errors import ExportError
from gptq_plugin.quantize.module import QuantizeModule


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


def refuse_new_folder(quantizer: QuantizeModule, export_dir: Path) -> None:
    """Refuses a run that is to be resumed, and whose export is in a folder that every run names anew.

    Raises:
        ExportError: It is.
    """
    hydra = HydraConfig.get()
    is_named = any(one.lstrip("+").startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for one in hydra.overrides.hydra)
    inside = export_dir.resolve().is_relative_to(Path(hydra.runtime.output_dir).resolve())
    if quantizer.resume and quantizer.cache_dir is None and inside and not is_named:
        raise ExportError(
            f"quantizer.resume=true goes on where a run with the same export_dir ended, and {export_dir} has a new "
            "name in every run: give export_dir=DIR or hydra.run.dir=DIR"
        )
