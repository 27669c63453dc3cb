"""GPTQCallback: when to quantize, with what data, and what is logged. No numerics.

The hook is `on_fit_end`: the last checkpoint is saved, EMA and SWA have written the averaged weights, the
strategy is torn down, and the process group, both dataloaders and the loggers still work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.forward import takes_of
from gptq_plugin.clients.client import Client
from gptq_plugin.device import memory
from gptq_plugin.finish.options import Finish
from gptq_plugin.lightning.calibration_forward import forward_as_in_training, loss_in_training, refuse_training_step
from gptq_plugin.lightning.first_step import ChecksFirstLoss
from gptq_plugin.lightning.launched_ranks import EndsLaunchedRanks
from gptq_plugin.lightning.module_choice import choose_module
from gptq_plugin.lightning.monitors import check_directions
from gptq_plugin.lightning.parallel_check import ParallelOutputs, may_differ
from gptq_plugin.lightning.progress_bar import progress_like
from gptq_plugin.lightning.sharding import is_sharded
from gptq_plugin.lightning.strategies import refuse_for_shards, refuse_sharded_adapters, refuse_strategy
from gptq_plugin.lightning.surroundings import (
    drop_optimizers,
    evaluating_eagerly,
    forward_device,
    is_dev_run,
    run_folders,
    trained,
    whole,
    without_adapters,
    without_training_state,
)
from gptq_plugin.lightning.trackers import log_report
from gptq_plugin.lightning.validation import check_metrics, loaders_to_calibrate, validate, validation_loaders
from gptq_plugin.lightning.which_weights import check_weights, uncompiled
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.adapters import base_copy, has_adapters, merged_in_place, note_untied
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.training.attempts import Attempts, Quality
from gptq_plugin.training.callback_base import CallbackBase, Origin, check_options, naming_the_nearest_option
from gptq_plugin.training.preflight import leaves_quantized, refuse_adapters, refuse_offload, refuse_quantized
from gptq_plugin.training.quality_gate import QualityGate
from gptq_plugin.training.unsharded import refuse_unknown_sharding


@naming_the_nearest_option
class GPTQCallback(CallbackBase, EndsLaunchedRanks, ChecksFirstLoss):
    """Quantizes the trained module at the end of `Trainer.fit`, and exports it.

    By default the transformers model that the LightningModule is, holds or contains is quantized; without one, the
    LightningModule itself. A run that could not be quantized (no layer to quantize, a group size that does not divide,
    an export folder that exists) is refused before the first training step. If quantization fails, the exception
    leaves `fit` with the trained weights in place and the checkpoints written.

    PEFT adapters are merged on a copy, which is quantized and exported; the adapters and their base do not change.

    Under a strategy that shards parameters these are put together in files beside the export. The module runs on them,
    memory-mapped, while it is tried before training and quantized after it; it stays sharded.

    Args:
        quantizer: Quantizes; holds the configuration.
        export_dir: Folder to write; None quantizes without export.
        weights: Which weights: "last", those at the end of training; "best", those of the best checkpoint of the first
            ModelCheckpoint that monitors a metric; or the path of a checkpoint.
        tokenizer: Saved with the export, and used on `calibration` texts; or the folder or hub id to load it from.
        calibration: ``"train"`` (as None) or ``"val"``: `config.nsamples` samples of the trainer's dataloaders, each
            once; or a DataLoader, which is sampled like them; or texts, rows with texts or chats (such as a
            `datasets.Dataset`), token lists or batches (see `calibration.collect`), the same on every rank, which uses
            its part.
        calibration_step: Runs a calibration batch, called as calibration_step(pl_module, batch). If None, the
            LightningModule's method `calibration_step(batch)` does, if it has one.
        mix: General text beside the run's own data: a DataLoader, or texts, token lists or batches, as above. Under
            ``token_weighting="labels"`` every token of a text is its own label.
        mix_fraction: The share of `config.nsamples` that comes from `mix`, at least one sample; 0 takes none.
        module: Dotted name, inside the LightningModule, of the module to quantize, if the default is not the right
            one; "" is the LightningModule itself.
        swap: True leaves the module quantized, so that `trainer.test(model)` runs on it; False exports and
            gives it its float weights back. None is True, but False for a module with PEFT adapters, or one that the
            strategy shards.
        overwrite: Replace an earlier export by this package in `export_dir`.
        target: The client that is to load the export ("vllm", "transformers", "sglang", "gptqmodel", or
            ``{"client": "vllm", "tensor_parallel_size": 2}``). If it would refuse the export, so does the callback,
            before training.
        validate: Run the module's `validation_step` over the validation dataloader before and after, and log both.
            None does so if there is one.
        max_degradation: How far logged metrics may move: ``{"val_loss": 0.02}`` may rise by 0.02, ``"2%"`` by so much
            of the float model's value; ``{"val_acc": -0.01}`` may fall by 0.01; ``"2% at 95%"`` has to be that sure.
        on_fail: What to do when a metric moves further: "raise" exports nothing and raises QualityError; "warn" logs a
            warning and exports; "escalate" quantizes again, in smaller groups and with more bits for the layers that
            do most to the model, until the limits hold.
        max_bits: Average bits per weight (scales and zeros included, g_idx not) that "escalate" may not exceed: if
            nothing within them is good enough, it raises. None sets no limit.
        push_to_hub: Uploads the export to the Hugging Face hub when all else is done: ``"owner/name"``, private unless
            ``{"repo_id": "owner/name", "private": False}``. Made, or checked, before training.
        finish: Trains the result towards the float model (with a `task_weight`, by the loss of `training_step` too) on
            samples of the same data, if held-out ones get nearer to it. What GPTQ gave is exported before.
        log_artifacts: True also gives the export to the trainer's loggers; a text names it, also in MLflow's registry.

    Attributes:
        report: Result of the last `fit`; None before.
    """

    def __init__(
        self,
        quantizer: QuantizeModule,
        export_dir: str | Path | None = None,
        *,
        tokenizer: Any = None,
        calibration: str | Iterable[Any] | None = None,
        calibration_step: Callable[[pl.LightningModule, Any], Any] | None = None,
        mix: Iterable[Any] | None = None,
        mix_fraction: float = 0.25,
        module: str | None = None,
        weights: str | Path = "last",
        swap: bool | None = None,
        overwrite: bool = False,
        target: Client | str | Mapping[str, Any] | None = None,
        validate: bool | None = None,
        max_degradation: Mapping[str, float | str] | None = None,
        on_fail: str = "raise",
        max_bits: float | None = None,
        push_to_hub: str | Mapping[str, Any] | None = None,
        finish: Finish | None = None,
        log_artifacts: bool | str = False,
    ):
        super().__init__(
            quantizer,
            export_dir,
            tokenizer=tokenizer,
            calibration=calibration,
            mix=mix,
            mix_fraction=mix_fraction,
            swap=swap,
            overwrite=overwrite,
            target=target,
            push_to_hub=push_to_hub,
            finish=finish,
        )
        given = {"weights": weights, "validate": validate, "log_artifacts": log_artifacts}
        check_options(calibration_step=calibration_step, module=module, **given)
        self.calibration_step, self.module = calibration_step, module
        self.weights, self.log_artifacts = str(weights), log_artifacts
        self.gate = QualityGate(max_degradation, on_fail, max_bits)
        if validate is False and self.gate.limits:
            raise ValueError("max_degradation needs validation, and validate=False switches it off")
        self.validate = validate
        self._peak_of_training: int | None = None  # bytes on a GPU, which quantization must not exceed

    @property
    def state_key(self) -> str:
        return self._generate_state_key(export_dir=str(self.export_dir), module=self.module)

    @distributed.ending_together()
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or is_dev_run(trainer):
            return
        earlier = self.report.float_checkpoint if self.report is not None else ""
        refuse_quantized(pl_module, earlier or "MyModule.load_from_checkpoint")
        refuse_for_shards(trainer, self.swap, self.export_dir, self.weights, self.finish)
        check_weights(trainer, self.weights)
        check_directions(trainer, self.gate.limits)
        refuse_strategy(trainer, self.leaves_quantized(trainer, pl_module))
        refuse_training_step(pl_module, self.finish)
        if not is_sharded(trainer):
            refuse_offload(self.quantizer, trainer.strategy.root_device)
        _refuse_after_swap(self, trainer, pl_module)
        self.agree_on_export_dir(run_folders(trainer))

    @distributed.ending_together()
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_dev_run(trainer):
            return
        if is_sharded(trainer):  # whole layers are checked in `on_train_start`
            refuse_sharded_adapters(trainer, pl_module)
            refuse_unknown_sharding(pl_module)
            return
        module = self.module_to_quantize(pl_module)
        refuse_adapters(module, self.swap, self.export_dir, holder=pl_module)
        module = base_copy(module) if has_adapters(module) else module
        with uncompiled(module):
            self.check_layers(module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds a metric that is not logged, if `check_metrics` could not before training."""
        if self.gate.limits and not is_dev_run(trainer):
            self.gate.check_names(trainer.callback_metrics)

    @distributed.ending_together()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs a batch of every source of calibration data, and one of validation if metrics have limits."""
        super().on_train_start(trainer, pl_module)
        if is_dev_run(trainer):
            return
        if (self.gate.limits or self.validate) and not validation_loaders(trainer):
            raise ValueError(
                "max_degradation and validate=True need a validation_step in the LightningModule and a validation "
                "dataloader that is not switched off (limit_val_batches=0)"
            )
        with isolate_rng():  # a sampler may draw from the global generator
            data = self.calibration_data(trainer)
            self.check_finish_data(partial(self.calibration_data, trainer))
        first = self.data.rehearsal_data(data)
        with isolate_rng(), evaluating_eagerly(pl_module):
            outputs = _parallel_outputs(self, trainer, pl_module)
            with whole(trainer, pl_module, self.export_dir), uncompiled(pl_module):
                if outputs is not None or self.gate.limits:
                    with streamed_to(pl_module, forward_device(trainer)):
                        check_metrics(trainer, pl_module, self.gate)
                        if outputs is not None:
                            outputs.check()
                if first is None and not is_sharded(trainer):
                    return  # the user's stream is not read before training
                chosen = self.module_to_quantize(pl_module)
                with without_adapters(trainer, pl_module, chosen, base_copy) as module:
                    _rehearse(self, trainer, pl_module, module, first, self.data.entire_data(data))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._peak_of_training = memory.peak_bytes(trainer.strategy.root_device)

    @distributed.ending_together()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_dev_run(trainer):
            rank_zero_info("fast_dev_run: nothing is quantized or exported")
            return
        with (
            without_training_state(trainer, pl_module),
            trained(trainer, pl_module, self.weights, self.export_dir) as state,
            progress_like(trainer) as progress,
        ):
            quality = _float_quality(self, trainer, pl_module)
            swap = self.leaves_quantized(trainer, pl_module)
            chosen = self.module_to_quantize(pl_module)
            with without_adapters(trainer, pl_module, chosen, merged_in_place) as module:
                step_loss = loss_in_training(trainer, pl_module)
                options = PassOptions(
                    self.calibration_forward(trainer, pl_module, module),
                    self.tokenizer,
                    device=forward_device(trainer),
                    device_memory=self._peak_of_training,
                    progress=progress,
                    export_dir=self.export_dir,
                )
                attempts = Attempts(
                    module,
                    data=partial(self.calibration_data, trainer),
                    options=options,
                    quality=quality,
                    keep=swap,
                    layers_in=None if state.files is None else state.files.layers,
                    target=self.target,
                    finish=self.finish_run(partial(self.calibration_data, trainer), step_loss),
                )
                run_id = getattr(trainer.logger, "version", None)
                origin = Origin(state.checkpoint, run_id, note_untied(chosen, module))
                report = self.quantize_and_export(attempts, origin)
            if swap:
                state.keep_weights()
                drop_optimizers(trainer)
        log_report(trainer, report, self.export_dir, self.log_artifacts)
        self.tell_result(report)
        self.upload()

    def leaves_quantized(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Returns whether the module stays quantized after `fit`."""
        return not is_sharded(trainer) and leaves_quantized(pl_module, self.swap)

    def module_to_quantize(self, pl_module: pl.LightningModule) -> nn.Module:
        """Returns the module to quantize; override to choose another. See `choose_module`."""
        return choose_module(pl_module, self.module, self.quantizer.run_log.warn)

    def calibration_data(self, trainer: pl.Trainer) -> Iterable[Any]:
        """Returns this rank's calibration data, and that of a finish; override to choose other samples."""
        return self.data.sources(trainer.train_dataloader, partial(loaders_to_calibrate, trainer))

    def calibration_forward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, module: nn.Module
    ) -> Callable[[nn.Module, Any], Any]:
        """Returns the function that runs a batch; override to run it otherwise. See `forward_as_in_training`."""
        step, every_logit = self.calibration_step, self.every_logit
        return forward_as_in_training(trainer, pl_module, module, step=step, every_logit=every_logit)


def _float_quality(callback: GPTQCallback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Quality:
    """The float module's metrics, and how the quantized one is measured and judged by them."""
    wanted = callback.validate is not False and validation_loaders(trainer)
    with streamed_to(pl_module, forward_device(trainer)):
        before = validate(trainer, pl_module) if wanted else {}
    callback.gate.check_before(before)
    return Quality(callback.gate, before, partial(validate, trainer, pl_module))


def _parallel_outputs(
    callback: GPTQCallback, trainer: pl.Trainer, pl_module: pl.LightningModule
) -> ParallelOutputs | None:
    """Outputs of the sharded module, if they may differ from those of the whole one."""
    if not is_sharded(trainer):
        return None
    module = callback.module_to_quantize(pl_module)
    first = callback.data.rehearsal_data(callback.calibration_data(trainer))
    if first is None or not may_differ(trainer, pl_module, module):
        return None
    forward = callback.calibration_forward(trainer, pl_module, module)
    takes = takes_of(module, forward)
    batches = collect(first, callback.quantizer.config, callback.tokenizer, alone=True, takes=takes).batches
    return ParallelOutputs(partial(forward, module), batches[0].data if batches else None)


def _refuse_after_swap(callback: GPTQCallback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    before = trainer.callbacks[: trainer.callbacks.index(callback)]  # type: ignore[attr-defined]
    if any(isinstance(other, GPTQCallback) and other.leaves_quantized(trainer, pl_module) for other in before):
        raise callback.after_swap()


def _rehearse(
    callback: GPTQCallback,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    module: nn.Module,
    first: Iterable[Any] | None,
    entire: Iterable[Any] | None,
) -> None:
    callback.check_export(module)
    if first is None:
        callback.quantizer.coverage(module)
        return
    callback.quantizer.rehearse(
        module,
        first,
        forward=callback.calibration_forward(trainer, pl_module, module),
        tokenizer=callback.tokenizer,
        device=forward_device(trainer),
        whole=callback.data.is_given,
        entire=entire,
    )
