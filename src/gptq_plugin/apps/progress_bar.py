"""The progress bar of gptq-finetune."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar


class StepsBar(TQDMProgressBar):
    """A bar for each epoch, which in a run that ends by `max_steps` tells how far the run is: ``step 980 of 1200``.

    Lightning's Rich bar shows the last epoch's number, `max_epochs` - 1, which is -2 in such a run.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._describe(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._describe(trainer)
        super().on_train_batch_end(trainer, *args)

    def _describe(self, trainer: pl.Trainer) -> None:
        if trainer.max_steps > 0:
            where = f"Epoch {trainer.current_epoch}, step {trainer.global_step} of {trainer.max_steps}"
            self.train_progress_bar.set_description(where, refresh=False)
