"""Ends the processes of a run that has lost a rank, if Lightning's own launcher started them: `EndsLaunchedRanks`.

torchrun and SLURM end all of a run's processes when one fails. Lightning's launcher leaves those that hang.
"""

from __future__ import annotations

import logging
import subprocess
import time
from typing import Any

import lightning.pytorch as pl

from gptq_plugin.errors import RankError
from gptq_plugin.lightning.roots import in_any_root

log = logging.getLogger(__name__)

_GRACE = 10  # seconds in which a rank that failed, or learns of it, has ended by itself


class EndsLaunchedRanks(pl.Callback):
    """Ends what Lightning's launcher started when this rank raises RankError."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        launcher: Any = trainer.strategy.launcher
        starts_them = isinstance(launcher, in_any_root("strategies.launchers._SubprocessScriptLauncher"))
        if not (starts_them and isinstance(exception, RankError)):
            return
        deadline = time.monotonic() + _GRACE
        for process in launcher.procs:  # of this node; none in the processes that were started
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("process %d of this run did not end, and is killed: %s", process.pid, exception)
                process.kill()
