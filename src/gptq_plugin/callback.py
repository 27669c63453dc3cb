"""GPTQCallback: when to quantize, with what data, and what is logged. No numerics.

The hook is `on_fit_end`: the last checkpoint is saved, EMA and SWA have written the averaged weights, the
strategy is torn down, and the process group, both dataloaders and the loggers still work.
"""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader

from gptq_plugin import distributed
from gptq_plugin.calibration import refuse_single
from gptq_plugin.errors import CalibrationError, ExportError, TargetError
from gptq_plugin.export import check_export_dir
from gptq_plugin.forward import call, fits
from gptq_plugin.lightning_roots import either
from gptq_plugin.pretrained import transformers_models
from gptq_plugin.progress import progress_like
from gptq_plugin.quantize import QuantizeModule, evaluating
from gptq_plugin.report import QuantizeReport
from gptq_plugin.sampling import calibration_batches

log = logging.getLogger(__name__)


class GPTQCallback(pl.Callback):
    """Quantizes what training ended with, at the end of `Trainer.fit`, and exports it.

    What is quantized is the transformers model the LightningModule is, holds or contains; without one, the
    LightningModule itself. What cannot work (no layer to quantize, a group size that does not divide, an
    export folder that exists, a strategy that shards parameters) is refused before the first training step.
    If quantization fails, the exception leaves `fit` with the trained weights in place and the checkpoints
    written.

    Args:
        quantizer: What to do.
        export_dir: Folder to write; None quantizes without export.
        tokenizer: Saved with the export, and used on `calibration` texts.
        calibration: Texts, token lists or batches (see `calibration.collect`), the same on every rank: each
            uses its part. None takes `config.nsamples` samples of the trainer's train dataloader, each once.
        module: Dotted name, inside the LightningModule, of the module to quantize, where the default is not
            the right one; "" is the LightningModule itself.
        swap: True leaves the module quantized, so that `trainer.test(model)` runs on it; False exports and
            gives it its float weights back.
        overwrite: Replace an earlier export of ours in `export_dir`.

    Attributes:
        report: What happened, after `fit`; None before.

    A LightningModule with a method `calibration_step(batch)` says with it how to run a calibration batch.
    """

    def __init__(
        self,
        quantizer: QuantizeModule,
        export_dir: str | Path | None = None,
        *,
        tokenizer: Any = None,
        calibration: Iterable[Any] | None = None,
        module: str | None = None,
        swap: bool = True,
        overwrite: bool = False,
    ):
        if not isinstance(quantizer, QuantizeModule):
            raise TypeError(f"quantizer must be a QuantizeModule, got {type(quantizer).__name__}")
        if export_dir is None and not swap:
            raise ValueError("with swap=False and no export_dir nothing of the quantization would remain")
        self.quantizer = quantizer
        self.export_dir = Path(export_dir) if export_dir is not None else None
        self.tokenizer = tokenizer
        refuse_single(calibration)
        if calibration is not None and iter(calibration) is calibration:  # it can be read only once
            calibration = list(islice(calibration, quantizer.config.nsamples + 1))
        self.calibration = calibration
        self.module = module
        self.swap = swap
        self.overwrite = overwrite
        self.report: QuantizeReport | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(export_dir=str(self.export_dir), module=self.module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or _is_dev_run(trainer):
            return
        _check_strategy(trainer, self.swap)
        if self.quantizer.offload_weights and trainer.strategy.root_device.type == "cuda":
            raise ValueError(
                "offload_weights=True streams a model from the CPU, and training has it on the GPU: leave the option "
                "out, or save a checkpoint and run gptq-quantize on it"
            )
        _check_other_callbacks(trainer, self)
        if self.export_dir is not None:
            _check_own_folders(trainer, self.export_dir)
            check_export_dir(self.export_dir, overwrite=self.overwrite)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_dev_run(trainer):
            self.quantizer.check(self.module_to_quantize(pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One calibration batch runs now, so that data that does not fit is found before the training."""
        if _is_dev_run(trainer):
            return
        data, whole = self.calibration_data(trainer), self.calibration is not None
        if not whole and not isinstance(data, DataLoader):
            return  # a stream of the user's own is not read ahead of its training
        module = self.module_to_quantize(pl_module)
        with isolate_rng(), evaluating(pl_module), torch.compiler.set_stance("force_eager"):
            self.quantizer.rehearse(
                module,
                data if whole else islice(data, 1),
                forward=self.calibration_forward(trainer, pl_module, module),
                tokenizer=self.tokenizer,
                whole=whole,
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_dev_run(trainer):
            log.info("fast_dev_run: nothing is quantized or exported")
            return
        module = self.module_to_quantize(pl_module)
        _free_training_state(trainer, pl_module)
        with (
            _on_device(pl_module, trainer.strategy.root_device),
            evaluating(pl_module),
            torch.compiler.set_stance("force_eager"),  # hooks and threads are not for compiled code
            progress_like(trainer) as progress,
        ):
            quantized = self.quantizer.temporarily(
                module,
                self.calibration_data(trainer),
                forward=self.calibration_forward(trainer, pl_module, module),
                tokenizer=self.tokenizer,
                progress=progress,
                keep=self.swap,
            )
            with quantized as self.report:
                self._export(module)
        _log_to_loggers(trainer, self.report)

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
        if self.calibration is not None:
            return islice(self.calibration, distributed.rank(), None, distributed.world_size())
        return calibration_batches(trainer.train_dataloader, self.quantizer.config)

    def calibration_forward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, module: nn.Module
    ) -> Callable[[nn.Module, Any], Any]:
        """How one batch is run: moved and cast as in training, then through `calibration_step`, or else
        through the first of these whose forward takes it: the module to quantize, the LightningModule, a
        transformers model inside it."""
        step = getattr(pl_module, "calibration_step", None)
        inside = [model for _, model in transformers_models(pl_module)]
        runners = [m for m in (module, pl_module, *inside) if _defines_forward(m)]
        every_logit = self.quantizer.config.lm_head

        def forward(_: nn.Module, batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
            with trainer.precision_plugin.forward_context():
                if callable(step):
                    return step(batch)
                if not runners:
                    raise CalibrationError(
                        f"{type(pl_module).__name__} has no forward: give it a method calibration_step(batch) that "
                        "runs a training batch through the model"
                    )
                # Only the LightningModule knows what a tuple means; the keys of a mapping say it themselves.
                if not isinstance(batch, Mapping):
                    return call(pl_module if pl_module in runners else runners[0], batch, every_logit=every_logit)
                otherwise = pl_module if pl_module in runners else runners[0]
                runner = next((m for m in runners if fits(m, batch)), otherwise)
                return call(runner, batch, every_logit=every_logit)

        return forward

    def _export(self, module: nn.Module) -> None:
        """Rank 0 writes; the others learn whether it could."""
        if self.export_dir is None:
            return
        error: Exception | None = None
        if distributed.rank() == 0:
            try:
                self._write(module, self.export_dir)
            except Exception as caught:  # noqa: BLE001 - raised again below, on every rank
                error = caught
        message = distributed.object_from_first(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if message is not None:
            raise ExportError(f"rank 0 could not export: {message}")

    def _write(self, module: nn.Module, directory: Path) -> None:
        try:
            check_export_dir(directory, overwrite=self.overwrite)
        except ExportError as error:
            # It was free when training began. Days of work are not thrown away over a name.
            directory = directory.with_name(f"{directory.name}-{uuid.uuid4().hex[:8]}")
            log.warning("%s: exporting to %s instead", error, directory)
            assert self.quantizer.report is not None
            self.quantizer.report.deviations.append(f"{error}: exported to {directory.name} instead")
            self.export_dir = directory
        self.quantizer.export(module, directory, tokenizer=self.tokenizer, overwrite=self.overwrite)


def _defines_forward(module: nn.Module) -> bool:
    root = next((kind for kind in either("LightningModule") if isinstance(module, kind)), None)
    return root is None or is_overridden("forward", module, root)


def _is_dev_run(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set by Lightning, but not declared


def _check_strategy(trainer: pl.Trainer, swap: bool) -> None:
    strategy = trainer.strategy
    sharding = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
    if any(isinstance(strategy, either(f"strategies.{name}")) for name in sharding):
        raise NotImplementedError(
            f"GPTQCallback needs whole parameters on every rank, and {type(strategy).__name__} shards them. Train "
            "without the callback, save a full checkpoint and run gptq-quantize on it"
        )
    if swap and isinstance(strategy.launcher, either("strategies.launchers._MultiProcessingLauncher")):
        raise ValueError(
            f"strategy {trainer.strategy.launcher._start_method!r} trains in processes whose modules do not come "  # type: ignore[union-attr]
            "back: the quantized layers would be lost. Use strategy='ddp', or swap=False with an export_dir"
        )


def _check_other_callbacks(trainer: pl.Trainer, callback: GPTQCallback) -> None:
    before = trainer.callbacks[: trainer.callbacks.index(callback)]  # type: ignore[attr-defined]
    if any(isinstance(other, GPTQCallback) and other.swap for other in before):
        raise ValueError(
            "an earlier GPTQCallback leaves the module quantized (swap=True), so this one would find nothing to "
            "quantize: give all but the last swap=False"
        )


def _check_own_folders(trainer: pl.Trainer, export_dir: Path) -> None:
    """The export replaces its folder as a whole, so the run's own files must not lie in it."""
    own = {"default_root_dir": trainer.default_root_dir, "the logger's folder": trainer.log_dir}
    for checkpoint in trainer.checkpoint_callbacks:
        own["ModelCheckpoint's folder"] = getattr(checkpoint, "dirpath", None)
    target = export_dir.resolve()
    for what, folder in own.items():
        if folder is not None and (target == Path(folder).resolve() or target in Path(folder).resolve().parents):
            raise ExportError(
                f"export_dir {export_dir} is or holds {what} ({folder}), where this run writes other files: choose "
                "a folder beside or below it"
            )


def _free_training_state(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Gradients and optimizer state go before quantization needs the memory; the checkpoints hold them."""
    pl_module.zero_grad(set_to_none=True)
    trainer.strategy.optimizers = []
    trainer.strategy.lr_scheduler_configs = []


@contextlib.contextmanager
def _on_device(pl_module: pl.LightningModule, device: torch.device) -> Iterator[None]:
    """Lightning has moved the module to the CPU by now; it goes back there afterwards."""
    origin = pl_module.device
    pl_module.to(device)
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
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()
