"""Lightning strategies at whose end GPTQCallback cannot quantize."""

from __future__ import annotations

import lightning.pytorch as pl

from gptq_plugin.lightning_roots import either

_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def refuse_strategy(trainer: pl.Trainer, swap: bool) -> None:
    """Raises for strategies that shard parameters, and for those whose processes take a swapped module with them.

    Raises:
        NotImplementedError: The strategy shards parameters.
        ValueError: It trains in processes whose modules do not come back, and `swap` is true.
    """
    strategy = trainer.strategy
    if any(isinstance(strategy, either(f"strategies.{name}")) for name in _SHARDING):
        raise NotImplementedError(
            f"GPTQCallback needs whole parameters on every rank, and {type(strategy).__name__} shards them. Train "
            "without the callback, save a checkpoint and run gptq-quantize ckpt=... on it"
        )
    launcher = strategy.launcher
    if swap and isinstance(launcher, either("strategies.launchers._MultiProcessingLauncher")):
        raise ValueError(
            f"strategy {getattr(launcher, '_start_method', '')!r} trains in processes whose modules do not come back: "
            "the quantized layers would be lost. Use strategy='ddp', or swap=False with an export_dir"
        )
