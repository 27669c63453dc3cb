"""GPTQCallback: when to quantize, with what data, and what is logged. No numerics.

The hook is `on_fit_end`: the last checkpoint is saved, EMA and SWA have written the averaged weights, the
strategy is torn down, and the process group, both dataloaders and the loggers still work.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import named
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.forward import call, evaluating, fits
from gptq_plugin.calibration.training_data import RunData
from gptq_plugin.clients.client import Client
from gptq_plugin.device import memory
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.export.staging import check_export_dir
from gptq_plugin.layers.qlinear import swap_modules
from gptq_plugin.lightning.consolidated import Consolidated
from gptq_plugin.lightning.parallel_check import Outputs, may_differ
from gptq_plugin.lightning.roots import in_any_root, overrides
from gptq_plugin.lightning.sharding import is_sharded
from gptq_plugin.lightning.strategies import refuse_for_shards, refuse_sharded_adapters, refuse_strategy
from gptq_plugin.lightning.unsharded import refuse_unknown_sharding, unsharded
from gptq_plugin.lightning.validation import validate, validation_loaders
from gptq_plugin.lightning.which_weights import check_weights, float_checkpoint, uncompiled, weights_of
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.adapters import base_copy, has_adapters, merged_in_place, note_untied
from gptq_plugin.model.hf_models import transformers_models
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.one_pass import Progress
from gptq_plugin.report.provenance import plain_name
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.attempts import Attempts
from gptq_plugin.training.preflight import (
    check_arguments,
    leaves_quantized,
    refuse_adapters,
    refuse_export,
    refuse_offload,
    refuse_quantized,
)
from gptq_plugin.training.progress import progress_like
from gptq_plugin.training.quality_gate import QualityGate
from gptq_plugin.training.rank0_export import check_own_folders, export_from_first, from_first

log = logging.getLogger(__name__)


class GPTQCallback(pl.Callback):
    """Quantizes what training ended with, at the end of `Trainer.fit`, and exports it.

    What is quantized is the transformers model the LightningModule is, holds or contains; without one, the
    LightningModule itself. What cannot work (no layer to quantize, a group size that does not divide, an
    export folder that exists) is refused before the first training step. If quantization fails, the exception leaves
    `fit` with the trained weights in place and the checkpoints written.

    PEFT adapters are merged on a copy, which is quantized and exported; the adapters and their base stay as they are.

    Under a strategy that shards parameters they are put together in files beside the export, and the module runs with
    these, mapped, while it is tried before training and quantized after it; it stays sharded.

    Args:
        quantizer: What to do.
        export_dir: Folder to write; None quantizes without export.
        weights: Which weights: "last", what training ended with; "best", those of the best checkpoint of the first
            ModelCheckpoint that monitors a metric; or the path of a checkpoint.
        tokenizer: Saved with the export, and used on `calibration` texts.
        calibration: ``"train"`` (as None) or ``"val"``: `config.nsamples` samples of the trainer's dataloaders, each
            once; or a DataLoader, which is sampled like them; or texts, token lists or batches (see
            `calibration.collect`), the same on every rank: each uses its part.
        calibration_step: Runs a calibration batch, called as calibration_step(pl_module, batch); None leaves it to
            the LightningModule's method `calibration_step(batch)`, if it has one.
        mix: General text beside the run's own data: a DataLoader, or texts, token lists or batches, as above. Under
            ``token_weighting="labels"`` every token of a text is its own label.
        mix_fraction: The share of `config.nsamples` that comes from `mix`, at least one sample; 0 takes none.
        module: Dotted name, inside the LightningModule, of the module to quantize, where the default is not
            the right one; "" is the LightningModule itself.
        swap: True leaves the module quantized, so that `trainer.test(model)` runs on it; False exports and
            gives it its float weights back. None is True, but False for a module with PEFT adapters, or one that the
            strategy shards.
        overwrite: Replace an earlier export of ours in `export_dir`.
        target: The client that is to load the export ("vllm", "transformers", "sglang", "gptqmodel", or
            ``{"client": "vllm", "tensor_parallel_size": 2}``): what it would not take is refused before training.
        validate: Run the module's `validation_step` over the validation dataloader before and after, and log both.
            None does so where there is one.
        max_degradation: How far logged metrics may move: ``{"val_loss": 0.02}`` may rise by 0.02, ``"2%"`` by so much
            of the float model's value; ``{"val_acc": -0.01}`` may fall by 0.01.
        on_fail: When that does not hold: "raise" exports nothing and raises QualityError; "warn" says so and exports;
            "escalate" quantizes again, in smaller groups and with more bits for the layers with the noisiest outputs,
            until it holds.
        max_bits: The average bits per weight (scales and zeros included, g_idx not) that "escalate" may not exceed:
            where nothing within them is good enough, it raises. None sets no limit.

    Attributes:
        report: What happened, after `fit`; None before.
    """

    def __init__(
        self,
        quantizer: QuantizeModule,
        export_dir: str | Path | None = None,
        *,
        tokenizer: Any = None,
        calibration: Iterable[Any] | None = None,
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
    ):
        check_arguments(quantizer, export_dir, swap)
        self.quantizer = quantizer
        self.export_dir = Path(export_dir) if export_dir is not None else None
        self.tokenizer = tokenizer
        if calibration_step is not None and not callable(calibration_step):
            raise TypeError(f"calibration_step must be callable, got {type(calibration_step).__name__}")
        self.calibration_step = calibration_step
        self.data = RunData(quantizer.config, calibration, mix, mix_fraction)
        self.module = module
        self.weights = str(weights)
        self.swap = swap
        self.overwrite = overwrite
        self.target = Client.of(target)
        self.gate = QualityGate(max_degradation or {}, on_fail, max_bits)
        if validate is False and self.gate.limits:
            raise ValueError("max_degradation needs validation, and validate=False switches it off")
        self.validate = validate
        self.report: QuantizeReport | None = None
        self._peak_of_training: int | None = None  # bytes on a GPU, which quantization is not to exceed

    @property
    def state_key(self) -> str:
        return self._generate_state_key(export_dir=str(self.export_dir), module=self.module)

    @distributed.ending_together()
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or _is_dev_run(trainer):
            return
        refuse_quantized(pl_module, self._float_checkpoint() or "MyModule.load_from_checkpoint")
        refuse_for_shards(trainer, self.swap, self.export_dir, self.weights)
        check_weights(trainer, self.weights)
        refuse_strategy(trainer, self.leaves_quantized(trainer, pl_module))
        if not is_sharded(trainer):
            refuse_offload(self.quantizer, trainer.strategy.root_device)
        self._check_others(trainer, pl_module)
        if self.export_dir is not None:
            self.export_dir = from_first(self.export_dir)
            check_own_folders(self.export_dir, _run_folders(trainer))
            check_export_dir(self.export_dir, overwrite=self.overwrite)

    @distributed.ending_together()
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_dev_run(trainer):
            return
        if is_sharded(trainer):  # layers are whole in `on_train_start`
            refuse_sharded_adapters(trainer, pl_module)
            refuse_unknown_sharding(pl_module)
            return
        module = self.module_to_quantize(pl_module)
        refuse_adapters(module, self.swap, self.export_dir, holder=pl_module)
        if has_adapters(module):
            module = base_copy(module)
        with uncompiled(module):
            self.quantizer.check(module)
            refuse_export(self.quantizer, module, self.export_dir, self.target)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A metric that is not logged is found in the sanity check before training, or else in the first validation."""
        if self.gate.limits and not _is_dev_run(trainer):
            self.gate.check_names(trainer.callback_metrics)

    @distributed.ending_together()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One calibration batch of every source runs now, so that what does not fit is found before training."""
        if _is_dev_run(trainer):
            return
        if (self.gate.limits or self.validate) and not validation_loaders(trainer):
            raise ValueError(
                "max_degradation and validate=True need a validation_step in the LightningModule and a validation "
                "dataloader that is not switched off (limit_val_batches=0)"
            )
        with isolate_rng():  # a sampler may draw from the global generator
            data = self.calibration_data(trainer)
        first = self.data.beginning(data)
        if first is None and not is_sharded(trainer):
            return  # a stream of the user's own is not read ahead of its training
        with isolate_rng(), evaluating(pl_module), torch.compiler.set_stance("force_eager"):
            outputs = self._parallel_outputs(trainer, pl_module)
            with (
                self._whole(trainer, pl_module),
                uncompiled(pl_module),
                _without_adapters(pl_module, self.module_to_quantize(pl_module), base_copy) as module,
            ):
                if outputs is not None:
                    with streamed_to(pl_module, _elsewhere(trainer)):
                        outputs.check()
                refuse_export(self.quantizer, module, self.export_dir, self.target)
                if first is None:
                    self.quantizer.coverage(module)
                    return
                with streamed_to(pl_module, _elsewhere(trainer), besides=module):
                    self.quantizer.rehearse(
                        module,
                        first,
                        forward=self.calibration_forward(trainer, pl_module, module),
                        tokenizer=self.tokenizer,
                        device=_elsewhere(trainer),
                        whole=self.data.is_given,
                    )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._peak_of_training = memory.peak_bytes(trainer.strategy.root_device)

    @distributed.ending_together()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_dev_run(trainer):
            log.info("fast_dev_run: nothing is quantized or exported")
            return
        _free_training_state(trainer, pl_module)
        with (
            self._whole(trainer, pl_module) as files,
            weights_of(trainer, pl_module, self.weights) as keep_weights,
            uncompiled(pl_module),
            _on_device(trainer, pl_module),
            evaluating(pl_module),
            torch.compiler.set_stance("force_eager"),  # hooks and threads are not for compiled code
            progress_like(trainer) as progress,
        ):
            wanted = self.validate is not False and validation_loaders(trainer)
            with streamed_to(pl_module, _elsewhere(trainer)):
                before = validate(trainer, pl_module) if wanted else {}
            self.gate.check_names(before)
            swap = self.leaves_quantized(trainer, pl_module)
            trained = self.module_to_quantize(pl_module)
            with (
                _without_adapters(pl_module, trained, merged_in_place) as module,
                streamed_to(pl_module, _elsewhere(trainer), besides=module),
            ):
                notes = note_untied(trained, module)
                self.report = self._quantize(trainer, pl_module, module, before, progress, swap, notes, files)
            if swap:
                keep_weights()
        _log_to_loggers(trainer, self.report)

    def _quantize(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        module: nn.Module,
        before: Mapping[str, float],
        progress: Progress | None,
        swap: bool,
        notes: list[str],
        files: Consolidated | None,
    ) -> QuantizeReport:
        """Until the result is good enough; exports it."""

        def finish(quantizer: QuantizeModule, report: QuantizeReport) -> None:
            report.float_checkpoint = self._float_checkpoint(trainer)
            report.run_id = plain_name(getattr(trainer.logger, "version", None)) or report.run_id
            report.deviations += notes
            if self.export_dir is not None:
                self.export_dir = export_from_first(
                    quantizer,
                    module,
                    self.export_dir,
                    tokenizer=self.tokenizer,
                    overwrite=self.overwrite,
                    target=self.target,
                )

        return Attempts(
            module,
            self.gate,
            before,
            measure=partial(validate, trainer, pl_module),
            data=partial(self.calibration_data, trainer),
            finish=finish,
            forward=self.calibration_forward(trainer, pl_module, module),
            tokenizer=self.tokenizer,
            progress=progress,
            keep=swap,
            device=_elsewhere(trainer),
            device_memory=self._peak_of_training,
            layers_in=None if files is None else files.layers,
            target=self.target,
        ).quantize(self.quantizer)

    def _whole(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> contextlib.AbstractContextManager[Consolidated | None]:
        """The module without the strategy's sharding, where there is any."""
        if not is_sharded(trainer):
            return nullcontext()
        assert self.export_dir is not None
        return unsharded(trainer, pl_module, self.export_dir)

    def _parallel_outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Outputs | None:
        """Of the module while it is sharded, where they may be others without that."""
        if not is_sharded(trainer):
            return None
        module = self.module_to_quantize(pl_module)
        first = self.data.beginning(self.calibration_data(trainer))
        if first is None or not may_differ(trainer, pl_module, module):
            return None
        batches = collect(first, self.quantizer.config, self.tokenizer).batches
        run = partial(self.calibration_forward(trainer, pl_module, module), module)
        return Outputs(run, batches[0].data if batches else None)

    def _check_others(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        if any(isinstance(other, GPTQCallback) and other.leaves_quantized(trainer, pl_module) for other in before):
            raise ValueError(
                "an earlier GPTQCallback leaves the module quantized (swap=True), so this one would find nothing to "
                "quantize: give all but the last swap=False"
            )

    def _float_checkpoint(self, trainer: pl.Trainer | None = None) -> str:
        if trainer is not None:
            return float_checkpoint(trainer, self.weights)
        return self.report.float_checkpoint if self.report is not None else ""

    def leaves_quantized(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the module is left quantized."""
        return not is_sharded(trainer) and leaves_quantized(pl_module, self.swap)

    def module_to_quantize(self, pl_module: pl.LightningModule) -> nn.Module:
        """The module `module` names, or the one transformers model inside, or the LightningModule.

        Raises:
            TargetError: `module` is no submodule, or there are several transformers models to choose from.
        """
        if self.module is not None:
            try:
                return pl_module.get_submodule(self.module)
            except AttributeError:
                children = ", ".join(name for name, _ in pl_module.named_children())
                raise TargetError(
                    f"module={self.module!r} is no submodule of {type(pl_module).__name__}, which has {children}"
                ) from None
        models = dict(transformers_models(pl_module))
        if len(models) > 1:
            raise TargetError(
                f"{type(pl_module).__name__} holds several transformers models ({', '.join(models)}): say which one "
                "to quantize with module=..., or module='' for all of it"
            )
        for name, model in models.items():
            outside = _parameters_outside(pl_module, model)
            if outside:
                log.warning(
                    "only the transformers model %r is quantized and exported; %s of %s are outside it. For all of "
                    "it, give module=''",
                    name,
                    ", ".join(outside[:4]),
                    type(pl_module).__name__,
                )
            return model
        return pl_module

    def calibration_data(self, trainer: pl.Trainer) -> Iterable[Any]:
        """What this rank calibrates on; override to choose other samples."""
        return self.data.sources(trainer.train_dataloader, partial(_validation_loaders, trainer))

    def calibration_forward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, module: nn.Module
    ) -> Callable[[nn.Module, Any], Any]:
        """How one batch is run: moved and cast as in training, then through `calibration_step`, or else
        through the first of these whose forward takes it: the module to quantize, the LightningModule, a
        transformers model inside it."""
        step = getattr(pl_module, "calibration_step", None)
        if self.calibration_step is not None:
            step = functools.partial(self.calibration_step, pl_module)
        inside = [model for _, model in transformers_models(pl_module)]
        runners = [m for m in (module, pl_module, *inside) if _defines_forward(m)]
        every_logit = self.quantizer.config.lm_head

        def forward(_: nn.Module, batch: Any) -> Any:
            batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                if callable(step):
                    return step(batch)
                if not runners:
                    raise CalibrationError(
                        f"{type(pl_module).__name__} has no forward: give it a method calibration_step(batch) that "
                        "runs a training batch through the model, or give GPTQCallback(calibration_step=...)"
                    )
                # Only the LightningModule knows what a tuple means; the names of a mapping's parts say it themselves.
                otherwise, parts = pl_module if pl_module in runners else runners[0], named(batch)
                runner = otherwise if parts is None else next((m for m in runners if fits(m, parts)), otherwise)
                return call(runner, batch, every_logit=every_logit, device=_elsewhere(trainer))

        return forward


def _validation_loaders(trainer: pl.Trainer) -> list[Any]:
    loaders = validation_loaders(trainer)
    if not loaders:
        raise CalibrationError(
            "calibration='val' takes its samples from the validation dataloader, and the trainer has none: give it "
            "one (with a validation_step, and limit_val_batches above 0), or GPTQCallback(calibration=LOADER)"
        )
    return loaders


def _defines_forward(module: nn.Module) -> bool:
    return not isinstance(module, in_any_root("LightningModule")) or overrides(module, "forward")


def _is_dev_run(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set by Lightning, but not declared


@contextlib.contextmanager
def _without_adapters(
    pl_module: pl.LightningModule, module: nn.Module, copied: Callable[[nn.Module], nn.Module]
) -> Iterator[nn.Module]:
    """The module to quantize: where it has adapters, a copy without them, which meanwhile stands in its place."""
    if not has_adapters(module):
        yield module
        return
    (name,) = [name for name, other in pl_module.named_modules() if other is module]
    plain = copied(module)
    swap_modules(pl_module, {name: plain})
    try:
        yield plain
    finally:
        swap_modules(pl_module, {name: module})


def _run_folders(trainer: pl.Trainer) -> Iterator[tuple[str, Any]]:
    yield "default_root_dir", trainer.default_root_dir
    yield "the logger's folder", trainer.log_dir
    for checkpoint in trainer.checkpoint_callbacks:
        yield "ModelCheckpoint's folder", getattr(checkpoint, "dirpath", None)


def _free_training_state(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Gradients and optimizer state go before quantization needs the memory; the checkpoints hold them."""
    pl_module.zero_grad(set_to_none=True)
    trainer.strategy.optimizers = []
    trainer.strategy.lr_scheduler_configs = []


def _elsewhere(trainer: pl.Trainer) -> torch.device | None:
    """Where forwards run, when the module is not there: whole weights come to the training device part by part."""
    return trainer.strategy.root_device if is_sharded(trainer) else None


@contextlib.contextmanager
def _on_device(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Lightning has moved the module to the CPU by now; it goes back there afterwards. A whole one stays there."""
    if is_sharded(trainer):
        yield
        return
    origin = pl_module.device
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(origin)


def _parameters_outside(pl_module: nn.Module, model: nn.Module) -> list[str]:
    inside = {id(parameter) for parameter in model.parameters()}
    return [name for name, parameter in pl_module.named_parameters() if id(parameter) not in inside]


def _log_to_loggers(trainer: pl.Trainer, report: QuantizeReport) -> None:
    metrics: dict[str, float] = {f"gptq/{key}": value for key, value in report.totals().items()}
    for module in report.quantized:
        for key in ("loss", "rtn_loss", "damp_percent", "tokens", "seconds"):
            value = float(getattr(module, key))
            if math.isfinite(value):
                metrics[f"gptq/{module.name}/{key}"] = value
    for name, values in report.metrics.items():
        metrics |= {f"gptq/{name}/{of}": value for of, value in values.items()}
        metrics[f"gptq/{name}/difference"] = values["gptq"] - values["float"]
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()
