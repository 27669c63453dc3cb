"""A progress bar for quantization of the trainer's kind: `progress_like`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from gptq_plugin.quantize.options import Progress
from gptq_plugin.training.progress import tqdm_progress


@contextlib.contextmanager
def progress_like(trainer: pl.Trainer) -> Iterator[Progress | None]:
    """Shows a task in the trainer's live Rich display, or else a tqdm bar; yields None if the trainer shows no bar."""
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or getattr(bar, "is_disabled", False):
        yield None
        return
    rich = getattr(bar, "progress", None)
    if rich is not None and hasattr(rich, "add_task"):
        yield _rich_progress(rich)  # the display is live until teardown, and a second one would tear it
    else:
        with tqdm_progress() as progress:
            yield progress


def _rich_progress(rich: Any) -> Progress:
    tasks: list[Any] = []

    def advance(done: int, total: int, what: str) -> None:
        if not tasks:  # Lightning's display needs a task's total when it is added
            tasks.append(rich.add_task("GPTQ", total=total))
        rich.update(tasks[0], completed=done, total=total)  # a finish's steps are others than the layers
        rich.refresh()

    return advance
