"""Chooses which of a run's weights are quantized: the last, those of the best checkpoint, or of a given one."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.lightning.checkpoint_file import has_other_weights, read_checkpoint
from gptq_plugin.lightning.roots import in_any_root


def check_weights(trainer: pl.Trainer, weights: str) -> None:
    """Refuses weights that `weights_of` could not find after training.

    Raises:
        CheckpointError: `weights` is "best", and no ModelCheckpoint monitors a metric and keeps what it finds best.
    """
    if weights == "best" and _monitoring(trainer) is None:
        raise CheckpointError(
            "weights='best' quantizes the checkpoint that ModelCheckpoint found best, and none of this trainer's "
            "monitors a metric and keeps a checkpoint (save_top_k=0 keeps none): add "
            "ModelCheckpoint(monitor='val_loss'), or use weights='last'"
        )


@contextlib.contextmanager
def weights_of(trainer: pl.Trainer, pl_module: pl.LightningModule, weights: str) -> Iterator[Callable[[], None]]:
    """Inside the block the module has these weights; afterwards those it had before.

    Args:
        trainer: After training.
        pl_module: Its module, unwrapped, on any device.
        weights: "last" changes nothing; "best", or the path of a checkpoint.

    Yields:
        A function that makes the weights stay after the block.

    Raises:
        CheckpointError: The checkpoint does not exist, or cannot be loaded into the module.
    """
    if weights == "last":
        yield lambda: None
        return
    path = _path(trainer, weights)
    tensors = {id(tensor): tensor for tensor in (*pl_module.parameters(), *pl_module.buffers())}
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True

    try:
        for tensor, data in before:
            tensor.data = data.clone()
        _load(trainer, pl_module, path)
        yield keep
    finally:
        if not kept:
            for tensor, data in before:
                tensor.data = data


def float_checkpoint(trainer: pl.Trainer, weights: str, state: Mapping[str, Any] | None) -> str:
    """Path of the checkpoint that was quantized, or of one that holds the last weights; empty if there is none.

    A `last.ckpt` may be older: a ModelCheckpoint that monitors a metric writes it only when it saves another. And
    weights may change after the last one is saved, as those that StochasticWeightAveraging averages do.

    Args:
        trainer: After training. Every rank calls it.
        weights: As for `weights_of`.
        state: The module's last state; None compares none with the checkpoint's.
    """
    if weights != "last":
        return str(_path(trainer, weights))
    saved = [c for c in _model_checkpoints(trainer) if c._last_global_step_saved == trainer.global_step]
    paths = [c._last_checkpoint_saved for c in saved]
    if state is not None:
        if distributed.rank() == 0:  # a file is read once
            paths = [path for path in paths if not has_other_weights(path, state)]
        paths = distributed.object_from_first(paths)
    return next(iter(paths), "")


def _load(trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
    """Loads a checkpoint as `trainer.test(ckpt_path=...)` does, but takes any hyperparameters."""
    try:
        checkpoint = _content(trainer, path)
        pl_module.on_load_checkpoint(checkpoint)
        pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
    except Exception as error:
        raise CheckpointError(
            f"the weights of {path} cannot be loaded into {type(pl_module).__name__}: {brief(error)}"
        ) from error


def _content(trainer: pl.Trainer, path: Path) -> dict[str, Any]:
    """The checkpoint through the trainer's own plugin, or read by itself if that refuses what it holds."""
    try:
        return dict(trainer.strategy.load_checkpoint(path))
    except pickle.UnpicklingError:
        return read_checkpoint(path)


def _path(trainer: pl.Trainer, weights: str) -> Path:
    if weights != "best":
        path = Path(weights).expanduser()
        if not os.path.exists(path):
            raise CheckpointError(f"weights={weights!r}: the checkpoint does not exist")
        return path
    callback = _monitoring(trainer)
    best = distributed.object_from_first(callback.best_model_path if callback is not None else "")
    if not best:
        raise CheckpointError(
            "weights='best': ModelCheckpoint has saved no checkpoint, since its metric was never logged. The trained "
            "weights are in the module and in the last checkpoint, which gptq-quantize takes"
        )
    return Path(best)


def _monitoring(trainer: pl.Trainer) -> Any:
    """The first ModelCheckpoint that monitors a metric and keeps what it finds best, or None."""
    return next((c for c in _model_checkpoints(trainer) if c.monitor is not None and c.save_top_k != 0), None)


def _model_checkpoints(trainer: pl.Trainer) -> list[Any]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, in_any_root("callbacks.ModelCheckpoint"))]


@contextlib.contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Puts modules in place of their `torch.compile` wrappers, so that layers have their own names."""
    wrappers = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if hasattr(child, "_orig_mod")
    ]
    for parent, name, child in wrappers:
        setattr(parent, name, child._orig_mod)
    try:
        yield
    finally:
        for parent, name, child in wrappers:
            setattr(parent, name, child)
