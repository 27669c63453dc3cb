"""Which direction of a metric is better, as the run's own callbacks tell: `check_directions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from gptq_plugin.lightning.roots import in_any_root
from gptq_plugin.training.quality_gate import Limit


def check_directions(trainer: pl.Trainer, limits: Mapping[str, Limit]) -> None:
    """Refuses a limit for the direction that a ModelCheckpoint or EarlyStopping of the run calls better: it would never
    be reached, however bad the quantized model is.

    Raises:
        ValueError: With the limit for the other direction.
    """
    kinds = (*in_any_root("callbacks.ModelCheckpoint"), *in_any_root("callbacks.EarlyStopping"))
    watching = [one for one in trainer.callbacks if isinstance(one, kinds)]  # type: ignore[attr-defined]
    monitors: list[Any] = watching
    for callback in monitors:
        limit = limits.get(callback.monitor or "")
        if limit is None or (callback.mode == "min") == (limit.amount > 0):
            continue
        size, right = (_written(value, limit.relative) for value in (abs(limit.amount), -limit.amount))
        raise ValueError(
            f"max_degradation lets {callback.monitor} {'fall' if limit.amount < 0 else 'rise'} by {size}, and "
            f"{type(callback).__name__}(mode={callback.mode!r}) calls that better: write "
            f"max_degradation={{{callback.monitor!r}: {right}}}"
        )


def _written(amount: float, relative: bool) -> str:
    return repr(f"{amount * 100:.6g}%") if relative else f"{amount:.6g}"
