"""A progress bar for quantization that fits the trainer's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gptq_plugin.quantize.one_pass import Progress

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@contextlib.contextmanager
def progress_like(trainer: Trainer) -> Iterator[Progress | None]:
    """A bar of the trainer's kind: a task in its live Rich display, else tqdm; none where it shows none."""
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or getattr(bar, "is_disabled", False):
        yield None
        return
    rich = getattr(bar, "progress", None)
    if rich is not None and hasattr(rich, "add_task"):
        # The Rich display is live until teardown; a second one would tear it.
        with _rich_task(rich) as progress:
            yield progress
    else:
        with tqdm_progress() as progress:
            yield progress


@contextlib.contextmanager
def tqdm_progress() -> Iterator[Progress]:
    """A tqdm bar over layers."""
    with tqdm(desc="GPTQ", unit="layer", dynamic_ncols=True) as bar:

        def advance(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what.rsplit(",", 1)[-1].strip()[-40:], refresh=False)
            bar.update(done - bar.n)

        yield advance


@contextlib.contextmanager
def _rich_task(rich: Any) -> Iterator[Progress]:
    tasks: list[Any] = []

    def advance(done: int, total: int, what: str) -> None:
        if not tasks:  # Lightning's display wants a task's total when it is added
            tasks.append(rich.add_task("GPTQ", total=total))
        rich.update(tasks[0], completed=done)
        rich.refresh()

    yield advance
