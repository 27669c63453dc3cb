"""Refuses a finish's `task_weight` where the first training step has no loss: `ChecksFirstLoss`.

What a `training_step` returns is not known before training: it may count, draw and gather, so that no trial is made.

Tested by tests/lightning/test_callback_finish.py: with trainings.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from gptq_plugin import distributed
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.train import check_loss
from gptq_plugin.lightning.surroundings import is_dev_run


class ChecksFirstLoss(pl.Callback):
    """Looks at what the first training step returned.

    Attributes:
        finish: Of the result.
    """

    finish: Finish
    _has_seen_a_step = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_seen_a_step = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raises CalibrationError on every rank, if the finish needs a loss and there is none on one.

        Of a batch that is None Lightning makes no step.
        """
        if self._has_seen_a_step or batch is None or is_dev_run(trainer):
            return
        self._has_seen_a_step = True
        if self.finish.kind != "none" and self.finish.task_weight:
            with distributed.ending_together():
                if not outputs:  # Lightning's words for None
                    check_loss(None, self.finish.task_weight)
