"""`CallbackBase`: the arguments both trainers' callbacks share, their checks, and the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.loss import reads_every_logit
from gptq_plugin.calibration.tokenizer import as_tokenizer
from gptq_plugin.calibration.training_data import TrainingData
from gptq_plugin.clients.client import Client
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.export.upload import Repository
from gptq_plugin.finish.chain import Chain
from gptq_plugin.finish.logits import LogitReader
from gptq_plugin.finish.options import Finish, check_finish
from gptq_plugin.finish.rows import check_batches
from gptq_plugin.options import fields
from gptq_plugin.options.known_names import field_defaults, naming_the_nearest
from gptq_plugin.quantize import arguments
from gptq_plugin.quantize.finishing import TaskLoss
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.report.provenance import plain_name
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.attempts import Attempts
from gptq_plugin.training.finish_run import FinishRun
from gptq_plugin.training.preflight import refuse_export
from gptq_plugin.training.rank0_export import export_on_rank0, rank0_folder, refuse_run_folders

log = logging.getLogger(__name__)

_KINDS = {  # of the arguments of both callbacks; others are checked by the modules that use them
    "export_dir": fields.optional(fields.PATH, "nothing is exported"),
    "swap": fields.optional(fields.SWITCH, "decided by the module"),
    "overwrite": fields.SWITCH,
    "forward": fields.optional(fields.FUNCTION, "calls the model"),
    "task_loss": fields.optional(fields.FUNCTION, "that of the labels"),
    "calibration_step": fields.optional(fields.FUNCTION, "the LightningModule's"),
    "module": fields.optional(fields.TEXT, "found by itself"),
    "weights": fields.PATH,
    "log_artifacts": fields.Kind("true, false, or the artifact's name", lambda value: isinstance(value, (bool, str))),
    "validate": fields.optional(fields.SWITCH, "if there is a validation_step"),
}

# What both callbacks are decorated with: options of their arguments are looked for among theirs.
naming_the_nearest_option = naming_the_nearest(QuantizeModule=arguments.ALL, Finish=field_defaults(Finish))


def check_options(**options: Any) -> None:
    """Checks arguments of the callbacks.

    Raises:
        ValueError: One has another type, or is out of range.
    """
    for name, value in options.items():
        _KINDS[name].check(name, value)


@dataclass(frozen=True)
class Origin:
    """Where a run's weights come from, for the report.

    Attributes:
        float_checkpoint: The checkpoint that holds the float weights; empty if none does.
        run_id: The run's name; ignored unless it may be published (see `plain_name`).
        notes: Deviations to add to the report.
    """

    float_checkpoint: str
    run_id: Any = None
    notes: list[str] = field(default_factory=list)

    def note_in(self, report: QuantizeReport) -> None:
        report.float_checkpoint = self.float_checkpoint
        report.run_id = plain_name(self.run_id) or report.run_id
        report.deviations += self.notes


class CallbackBase:
    """Base class of GPTQCallback and GPTQTrainerCallback.

    Args:
        quantizer, export_dir, tokenizer, calibration, mix, mix_fraction, swap, overwrite, target: As for the callbacks,
            which document them.
        push_to_hub, finish: The same.

    Attributes:
        data: Chooses the calibration data.
        finish: Of the result; of the kind "none" if there is none.
        finish_data: Chooses its data: of the same, with other numbers of samples.
        target: The client to export for, or None.
        repository: Where the export is uploaded, or None.
        report: Result of the last run; None before.

    Raises:
        TypeError: `quantizer` is not a QuantizeModule, or `tokenizer` is not a tokenizer.
        ValueError: Nothing would remain of the quantization, an option is out of range, or no tokenizer can be loaded
            from the folder or hub id given.
        CalibrationError: `calibration` or `mix` is a single text or batch.
    """

    def __init__(
        self,
        quantizer: QuantizeModule,
        export_dir: str | Path | None,
        *,
        tokenizer: Any,
        calibration: str | Iterable[Any] | None,
        mix: Iterable[Any] | None,
        mix_fraction: float,
        swap: bool | None,
        overwrite: bool,
        target: Client | str | Mapping[str, Any] | None,
        push_to_hub: str | Mapping[str, Any] | None,
        finish: Finish | None,
    ) -> None:
        if not isinstance(quantizer, QuantizeModule):
            raise TypeError(f"quantizer must be a QuantizeModule, got {type(quantizer).__name__}")
        check_options(export_dir=export_dir, swap=swap, overwrite=overwrite)
        if export_dir is None and swap is False:
            raise ValueError(
                "with swap=False and no export_dir nothing of the quantization would remain: give an export_dir, or "
                "leave swap out"
            )
        self.quantizer = quantizer
        self.export_dir = Path(export_dir) if export_dir is not None else None
        self.tokenizer = as_tokenizer(tokenizer, saved=export_dir is not None)
        self.finish = check_finish(finish)
        # Chosen first: of data that can be read once, it keeps the more samples.
        config = self.finish.data_config(quantizer.config) if self.finishes else quantizer.config
        self.finish_data = TrainingData(config, calibration, mix, mix_fraction)
        kept = self.finish_data.calibration, self.finish_data.mix
        self.data = TrainingData(quantizer.config, *kept, mix_fraction) if self.finishes else self.finish_data
        self.swap = swap
        self.overwrite = overwrite
        self.target = Client.of(target)
        self.repository = Repository.of(push_to_hub)
        if self.repository is not None and export_dir is None:
            raise ValueError(f"push_to_hub={self.repository} uploads the export, and there is none: give an export_dir")
        if quantizer.resume and export_dir is None and quantizer.cache_dir is None:
            raise ValueError("resume=True keeps solved layers beside the export, and there is none: give an export_dir")
        self.report: QuantizeReport | None = None

    @property
    def finishes(self) -> bool:
        """True if the result is to be finished."""
        return self.finish.kind != "none"

    @property
    def every_logit(self) -> bool:
        """True if batches have to give the logits of all positions."""
        return self.finishes or reads_every_logit(self.quantizer.config)

    def finish_run(self, calibration_data: Callable[[], Iterable[Any]], task_loss: TaskLoss | None) -> FinishRun | None:
        """The finish; None without one.

        Args:
            calibration_data: The callback's method of that name, which users override: called with `finish_data` as
                `data`.
            task_loss: The loss of the run, for a finish with a `task_weight`.
        """

        samples = partial(self._samples_of_finish, calibration_data)
        loss = task_loss if self.finish.task_weight else None
        return FinishRun(self.finish, samples, loss) if self.finishes else None

    def check_finish_data(self, calibration_data: Callable[[], Iterable[Any]]) -> None:
        """Refuses, before training, too few samples for the finish, where their number is known. Every rank calls it.

        Args:
            calibration_data: As for `finish_run`.
        """
        if self.finishes:
            config = self.finish.data_config(self.quantizer.config)
            check_batches(self._samples_of_finish(calibration_data), config)

    def _samples_of_finish(self, calibration_data: Callable[[], Iterable[Any]]) -> Iterable[Any]:
        own, self.data = self.data, self.finish_data
        try:
            return calibration_data()
        finally:
            self.data = own

    def agree_on_export_dir(self, run_folders: Iterable[tuple[str, Any]]) -> None:
        """Takes rank 0's `export_dir` on every rank and refuses one that cannot be written. Every rank calls it.

        Args:
            run_folders: Name and path of each folder the run itself writes to; see `refuse_run_folders`.

        Raises:
            ExportError: The folder belongs to the run, or exists and must not be replaced; or the hub's repository
                cannot be written to.
        """
        if self.export_dir is not None:
            self.export_dir = rank0_folder(self.export_dir)
            refuse_run_folders(self.export_dir, run_folders)
            check_export_dir(self.export_dir, overwrite=self.overwrite)
            if self.repository is not None and distributed.rank() == 0:
                self.repository.claim()

    def after_swap(self) -> ValueError:
        """Returns the error of a callback behind one that leaves nothing to quantize."""
        return ValueError(
            f"an earlier {type(self).__name__} leaves the model quantized (swap=True), so this one would find nothing "
            "to quantize: give all but the last swap=False"
        )

    def check_layers(self, module: nn.Module) -> None:
        """Refuses a module without layers to quantize, or one whose export could not be written or loaded.

        Raises:
            TargetError: See `QuantizeModule.check`; or the finish cannot read its logits (`LogitReader`), or has no
                blocks to train (`Chain`).
            ExportError: See `check_export`.
        """
        self.quantizer.check(module)
        if self.finishes:
            LogitReader(module)
        if self.finish.by_blocks:
            Chain.check(module)
        self.check_export(module)

    def check_export(self, module: nn.Module) -> None:
        """Raises ExportError if the quantized module could not be saved, or its client would refuse it."""
        refuse_export(self.quantizer, module, self.export_dir, self.target)

    def quantize_and_export(self, attempts: Attempts, origin: Origin) -> QuantizeReport:
        """The end of a run: quantizes until the result is good enough, and exports it from rank 0.

        Sets `report`, and `export_dir` to the folder that was written. Every rank calls it.

        Args:
            attempts: The model, and how to quantize and judge it.
            origin: Where its weights come from.

        Raises:
            QualityError: No attempt is good enough.
            Exception: The quantization or the export failed; the model has its float weights.
        """

        is_written = False

        def accept(quantizer: QuantizeModule, report: QuantizeReport) -> None:
            nonlocal is_written
            if not is_written:
                origin.note_in(report)
            if self.export_dir is not None:
                self.export_dir = export_on_rank0(
                    quantizer,
                    attempts.model,
                    self.export_dir,
                    tokenizer=attempts.options.tokenizer,
                    overwrite=self.overwrite or is_written,
                    target=self.target,
                )
            is_written = True

        self.report = attempts.quantize(self.quantizer, accept)
        return self.report

    def tell_result(self, report: QuantizeReport) -> None:
        """Shows users the layers and the result, on rank 0. To be called when no progress bar is in the way."""
        self.quantizer.run_log.end(report, self.export_dir)

    def upload(self) -> None:
        """Uploads the export from rank 0, if the run asks for it. The last step: nothing is lost if it fails.

        Raises:
            ExportError: The hub did not take it; the message has the command that tries again.
        """
        repository, folder = self.repository, self.export_dir
        if repository is not None and folder is not None:
            distributed.first_works(lambda: log.info("uploaded to %s", repository.push(folder)))
