"""The state of a Trainer and its model around quantization, as context managers, and the run's checkpoints."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from gptq_plugin.hf.checkpoints import checkpoint_of
from gptq_plugin.quantize.options import Progress
from gptq_plugin.training.callback_base import CallbackBase
from gptq_plugin.training.progress import tqdm_progress

log = logging.getLogger(__name__)

_LEAVES_QUANTIZED = "_left_quantized_by"  # no field of the state: it is not saved


@contextlib.contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """Restores all random generators after the block: datasets and collators in it do not change the training."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


@contextlib.contextmanager
def weights_saved_on_failure(
    model: nn.Module, args: TrainingArguments, state: TrainerState, saved: int
) -> Iterator[None]:
    """Saves the trained weights if the block raises, or is interrupted, and no checkpoint holds them.

    A script whose `train` raises does not reach its `save_model`.

    Args:
        model: Trained.
        args, state: Of its training.
        saved: As for `float_checkpoint`.
    """
    try:
        yield
    except BaseException:
        if state.is_world_process_zero and state.global_step and not float_checkpoint(args, state, saved):
            folder = checkpoint_of(args, state).with_name(f"trained-{state.global_step}")
            log.error("quantization failed, and no checkpoint holds the trained weights: saving them to %s", folder)
            _save(model, folder)
        raise


@contextlib.contextmanager
def progress_like(args: TrainingArguments, state: TrainerState) -> Iterator[Progress | None]:
    """Shows a tqdm bar on rank 0; yields None if the trainer shows no bar."""
    if args.disable_tqdm or not state.is_world_process_zero:
        yield None
    else:
        with tqdm_progress() as progress:
            yield progress


def float_checkpoint(args: TrainingArguments, state: TrainerState, saved: int) -> str:
    """Path of the run's checkpoint that holds the trained weights; empty if there is none.

    Args:
        args, state: Of the training.
        saved: Step of its last checkpoint (`FollowsCheckpoints`).
    """
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    if best is not None and Path(best).exists():  # else the trainer went on with the last weights
        return best
    last = checkpoint_of(args, state)
    return str(last) if saved == state.global_step and last.exists() else ""


def refuse_after_swap(state: TrainerState, callback: CallbackBase, leaves_quantized: bool) -> None:
    """Refuses a callback behind one that leaves the model quantized. Each is to call it when a training begins.

    Callbacks do not know of each other: the training's state, which is new in each, tells.

    Raises:
        ValueError: An earlier one leaves nothing to quantize.
    """
    if vars(state).get(_LEAVES_QUANTIZED, id(callback)) != id(callback):
        raise callback.after_swap()
    if leaves_quantized:
        vars(state)[_LEAVES_QUANTIZED] = id(callback)


def drop_replaced_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Removes parameters from the optimizer that are no longer in the model, so that their memory is freed."""
    left = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in left]


def _save(model: nn.Module, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):  # saves only the adapters of a model with adapters
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
