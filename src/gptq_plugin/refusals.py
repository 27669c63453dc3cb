"""What a Lightning run cannot end in, said before it begins."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from torch import nn

from gptq_plugin.adapters import has_adapters
from gptq_plugin.errors import TargetError
from gptq_plugin.lightning_roots import either
from gptq_plugin.qlinear import QuantLinear

_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def refuse_quantized(pl_module: pl.LightningModule, float_checkpoint: str) -> None:
    """Raises TargetError for a module that was quantized already: it has nothing to train."""
    if any(isinstance(layer, QuantLinear) for layer in pl_module.modules()):
        raise TargetError(
            f"{type(pl_module).__name__} is quantized, and quantized weights cannot be trained: build the module "
            f"anew, or load a float checkpoint into a new one ({float_checkpoint or 'MyModule.load_from_checkpoint'})"
        )


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


def refuse_adapters(
    module: nn.Module, pl_module: pl.LightningModule, swap: bool | None, export_dir: Path | None
) -> None:
    """Raises TargetError for what cannot be done with a module that has PEFT adapters, which is quantized on a copy."""
    if not has_adapters(module):
        return
    if swap:
        raise TargetError(
            "swap=True leaves the module quantized, and PEFT adapters stay as they are: leave swap out, and load the "
            "export with load_quantized"
        )
    if export_dir is None:
        raise TargetError("a module with PEFT adapters is quantized on a copy: give an export_dir for it")
    if module is pl_module:
        raise TargetError(
            f"{type(pl_module).__name__} itself carries PEFT adapters, and a copy cannot stand in its place: hold the "
            "model in an attribute"
        )
