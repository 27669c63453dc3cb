"""Refuses Lightning strategies the callback supports only in part, or not at all."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from torch import nn

from gptq_plugin.errors import TargetError
from gptq_plugin.finish.options import Finish
from gptq_plugin.lightning.roots import in_any_root
from gptq_plugin.lightning.sharding import is_sharded
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.training.preflight import refuse_with_shards


def refuse_strategy(trainer: pl.Trainer, swap: bool) -> None:
    """Raises ValueError for `swap` under a strategy whose processes do not hand their modules back."""
    launcher = trainer.strategy.launcher
    if swap and isinstance(launcher, in_any_root("strategies.launchers._MultiProcessingLauncher")):
        raise ValueError(
            f"strategy {getattr(launcher, '_start_method', '')!r} trains in processes whose modules do not come back: "
            "the quantized layers would be lost. Use strategy='ddp', or swap=False with an export_dir"
        )


def refuse_for_shards(
    trainer: pl.Trainer, swap: bool | None, export_dir: Path | None, weights: str, finish: Finish
) -> None:
    """Raises ValueError for options that need a whole module, if the strategy shards parameters.

    Args:
        trainer: With any strategy.
        swap, export_dir, weights, finish: The callback's options.
    """
    if not is_sharded(trainer):
        return
    strategy = type(trainer.strategy).__name__
    refuse_with_shards(strategy, swap, export_dir, finish, "gptq-quantize ckpt=...", "strategy='ddp'")
    if weights != "last":
        raise ValueError(
            f"weights={weights!r}: under {strategy} only the weights at the end of training are quantized "
            "(weights='last'). Run gptq-quantize ckpt=... on the checkpoint afterwards"
        )


def refuse_sharded_adapters(trainer: pl.Trainer, module: nn.Module) -> None:
    """Raises TargetError for PEFT adapters on sharded parameters."""
    if is_sharded(trainer) and has_adapters(module):
        raise TargetError(
            f"PEFT adapters are not merged under {type(trainer.strategy).__name__}: train without the callback, and "
            "run gptq-quantize ckpt=... adapter=... on what was saved, or train with strategy='ddp'"
        )
