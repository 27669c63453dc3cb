"""How a calibration batch is run: as the trainer would, through a `calibration_step` or the forward that takes it; and
its loss, of the `training_step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from gptq_plugin.calibration.batches import fields_of, to_device
from gptq_plugin.calibration.forward import CallsModels, accepts, call, standing_for
from gptq_plugin.errors import CalibrationError
from gptq_plugin.finish.options import Finish
from gptq_plugin.lightning.logging_to import logging_to
from gptq_plugin.lightning.roots import in_any_root, overrides
from gptq_plugin.lightning.surroundings import forward_device
from gptq_plugin.model.hf_models import transformers_models

# Hooks that may read any field of a batch.
_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def forward_as_in_training(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    module: nn.Module,
    *,
    step: Callable[[pl.LightningModule, Any], Any] | None = None,
    every_logit: bool = False,
) -> Callable[[nn.Module, Any], Any]:
    """Returns a function that moves and casts a batch as in training and runs it.

    It runs through the calibration step, if there is one, or else through the first of these whose forward takes the
    batch: the module to quantize, the LightningModule, a transformers model inside it.

    Args:
        trainer: Provides precision and device.
        pl_module: Prepares the batch; its method `calibration_step` is used if `step` is None.
        module: To be quantized.
        step: Called as step(pl_module, batch).
        every_logit: See `forward.call`.

    Raises:
        CalibrationError: From the function, if there is neither a step nor a forward.
    """
    run_step = getattr(pl_module, "calibration_step", None) if step is None else partial(step, pl_module)
    inside = [model for _, model in transformers_models(pl_module)]
    runners = [m for m in (module, pl_module, *inside) if _defines_forward(m)]

    def forward(_: nn.Module, batch: Any) -> Any:
        batch = _moved(trainer, pl_module, batch)
        with trainer.precision_plugin.forward_context():
            if callable(run_step):
                return run_step(batch)
            if not runners:
                raise CalibrationError(
                    f"{type(pl_module).__name__} has no forward: give it a method calibration_step(batch) that "
                    "runs a training batch through the model, or give GPTQCallback(calibration_step=...)"
                )
            # Only the LightningModule knows what a tuple's elements mean; a mapping names its parts.
            default, parts = pl_module if pl_module in runners else runners[0], fields_of(batch)
            runner = default if parts is None else next((m for m in runners if accepts(m, parts)), default)
            return call(runner, batch, every_logit=every_logit, device=forward_device(trainer))

    precision = trainer.precision_plugin
    standing_for(forward, pl_module, run_step, runners, type(precision).__qualname__, precision.precision, every_logit)
    only_fields = runners and not callable(run_step) and not any(overrides(pl_module, hook) for hook in _TRANSFERS)
    return CallsModels(forward, runners) if only_fields else forward


def loss_in_training(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[nn.Module, Any], Tensor]:
    """Returns a function that moves and casts a batch as in training and gives what the `training_step` makes of it.
    Nothing is logged."""

    def loss(_: nn.Module, batch: Any) -> Any:
        numbered = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        batch = _moved(trainer, pl_module, batch)
        with trainer.precision_plugin.forward_context(), logging_to(pl_module, _nothing, _nothing):
            output = pl_module.training_step(batch, 0) if numbered else pl_module.training_step(batch)
        return output.get("loss") if isinstance(output, Mapping) else output

    return loss


def refuse_training_step(pl_module: pl.LightningModule, finish: Finish) -> None:
    """Refuses a `task_weight` with a `training_step` that does not return the loss of a batch.

    Raises:
        ValueError: The module optimizes by itself, or its `training_step` draws the batches.
    """
    if finish.kind == "none" or not finish.task_weight:
        return
    own = "optimizes by itself (automatic_optimization=False)"
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        own = "draws its batches by itself (dataloader_iter)"
    elif pl_module.automatic_optimization:
        return
    raise ValueError(
        f"task_weight={finish.task_weight:g} needs the loss that a training_step returns for a batch, and "
        f"{type(pl_module).__name__} {own}: leave task_weight out"
    )


def _moved(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """A copy of a batch as training has it: cast, and on the device."""
    batch = trainer.precision_plugin.convert_input(to_device(batch, None))
    batch = pl_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _defines_forward(module: nn.Module) -> bool:
    return not isinstance(module, in_any_root("LightningModule")) or overrides(module, "forward")
