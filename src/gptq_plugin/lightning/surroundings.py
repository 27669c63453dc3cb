"""The state of a Trainer and its module around quantization, as context managers that restore it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.layers.swap import swapped
from gptq_plugin.lightning.sharding import is_sharded, sharding_of
from gptq_plugin.lightning.which_weights import float_checkpoint, uncompiled, weights_of
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.adapters import has_adapters
from gptq_plugin.training.consolidated import Consolidated
from gptq_plugin.training.optimizer_state import on_cpu
from gptq_plugin.training.unsharded import unsharded


@dataclass(frozen=True)
class Trained:
    """The trained module inside `trained`.

    Attributes:
        files: Holds the weights that a strategy had sharded; None if it had not.
        keep_weights: Called to leave the chosen weights in the module after the block.
        checkpoint: Path of a checkpoint that holds them; empty if there is none.
    """

    files: Consolidated | None
    keep_weights: Callable[[], None]
    checkpoint: str


@contextlib.contextmanager
def trained(
    trainer: pl.Trainer, pl_module: pl.LightningModule, weights: str, export_dir: Path | None
) -> Iterator[Trained]:
    """After training: the module whole, with the chosen weights, on the training device, in evaluation mode.

    Args:
        trainer: At the end of `fit`.
        pl_module: Its module.
        weights: As for `weights_of`.
        export_dir: Sharded weights are put together beside it.
    """
    checkpoint = float_checkpoint(trainer, weights, None if is_sharded(trainer) else pl_module.state_dict())
    with (
        whole(trainer, pl_module, export_dir) as files,
        weights_of(trainer, pl_module, weights) as keep_weights,
        uncompiled(pl_module),
        _on_training_device(trainer, pl_module),
        evaluating_eagerly(pl_module),
    ):
        yield Trained(files, keep_weights, checkpoint)


@contextlib.contextmanager
def whole(trainer: pl.Trainer, pl_module: pl.LightningModule, export_dir: Path | None) -> Iterator[Consolidated | None]:
    """The module without its strategy's sharding. If the strategy does not shard, nothing changes."""
    if not is_sharded(trainer):
        yield None
        return
    assert export_dir is not None  # `refuse_for_shards` has checked it
    strategy: Any = trainer.strategy
    place = {"device": strategy.root_device, "node": strategy.node_rank, "local_rank": strategy.local_rank}
    with unsharded(pl_module, sharding_of(trainer), export_dir, **place) as files:
        yield files
    del files
    gc.collect()  # cycles of what ran in the block keep its files mapped, and with them their room on the disk


@contextlib.contextmanager
def evaluating_eagerly(pl_module: nn.Module) -> Iterator[None]:
    """Evaluation mode without compiled code, which hooks and threads do not go through."""
    with evaluating(pl_module), torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def without_adapters(
    trainer: pl.Trainer, pl_module: pl.LightningModule, module: nn.Module, copy: Callable[[nn.Module], nn.Module]
) -> Iterator[nn.Module]:
    """Yields the module to quantize; if it has PEFT adapters, a copy without them that takes its place meanwhile.

    The other weights of the LightningModule are streamed to where forwards run, in case they lie elsewhere.

    Args:
        trainer: Of the module.
        pl_module: Holds `module`.
        module: To be quantized.
        copy: `base_copy` or `merged_in_place`.
    """
    with contextlib.ExitStack() as stack:
        if has_adapters(module):
            (name,) = [name for name, other in pl_module.named_modules() if other is module]
            module = copy(module)
            stack.enter_context(swapped(pl_module, {name: module}))
        stack.enter_context(streamed_to(pl_module, forward_device(trainer), besides=module))
        yield module


def forward_device(trainer: pl.Trainer) -> torch.device | None:
    """Where forwards run if the module is not there: whole weights of a sharded one come to the device in parts."""
    return trainer.strategy.root_device if is_sharded(trainer) else None


@contextlib.contextmanager
def without_training_state(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Frees gradients, and keeps the optimizers' state off the device inside the block: quantization needs memory."""
    pl_module.zero_grad(set_to_none=True)
    with on_cpu(trainer.optimizers):
        yield


def drop_optimizers(trainer: pl.Trainer) -> None:
    """Drops optimizers and schedulers of a module that stays quantized: they hold its float weights."""
    trainer.strategy.optimizers = []
    trainer.strategy.lr_scheduler_configs = []


def is_dev_run(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set by Lightning, but not declared


def run_folders(trainer: pl.Trainer) -> Iterator[tuple[str, Any]]:
    """Name and path of each folder the run writes to; the path may be None."""
    yield "default_root_dir", trainer.default_root_dir
    yield "the logger's folder", trainer.log_dir
    for checkpoint in trainer.checkpoint_callbacks:
        yield "ModelCheckpoint's folder", getattr(checkpoint, "dirpath", None)


@contextlib.contextmanager
def _on_training_device(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Moves the module back to the training device, from which Lightning has taken it by now. A sharded one stays."""
    if is_sharded(trainer):
        yield
        return
    origin = pl_module.device
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(origin)
