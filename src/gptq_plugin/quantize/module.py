"""QuantizeModule: the order of the steps.

plan → refuse what cannot work → collect batches → one pass: find groups, then walk in lock-step, quantizing each layer
→ swap in QuantLinear → report → export.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_plugin.allocation.budget import check_budget
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.clients.client import Client
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.surroundings import alone
from gptq_plugin.export.export import export_model
from gptq_plugin.export.verify_outputs import Sample
from gptq_plugin.model.plan import planned
from gptq_plugin.model.targets import Skipped, Target
from gptq_plugin.quantize import arguments, export_on_the_way
from gptq_plugin.quantize.allocate import Allocated, allocate, with_chosen_grids
from gptq_plugin.quantize.finishing import Finishing
from gptq_plugin.quantize.in_place import copy_training_flags, rounded, swapped
from gptq_plugin.quantize.model_of_report import ModelOfReport
from gptq_plugin.quantize.options import ModelForward, PassOptions, Progress
from gptq_plugin.quantize.outcome import rounded_report
from gptq_plugin.quantize.prepare import budgeted, check_client, prepared, refuse_without_values, undisturbed
from gptq_plugin.quantize.ran_short import run_pass
from gptq_plugin.quantize.rehearsal import rehearse, rest_of
from gptq_plugin.quantize.resuming import Resuming
from gptq_plugin.quantize.run_log import RunLog
from gptq_plugin.quantize.uploads import Uploads
from gptq_plugin.report.coverage import Coverage
from gptq_plugin.report.report import QuantizeReport


class QuantizeModule(Finishing, Uploads, Resuming):
    """Quantizes a model in place with GPTQ and exports it.

    Args:
        config: What to quantize and how; QuantizeConfig's defaults when None.
        offload_weights: True copies weights to the device block by block, False all; None decides. See `quantize`.
        offload_activations: True keeps what waiting batches hold on the CPU, False on the device; None what fits there.
        exact_sums: True gives the same bytes on any number of ranks; None does too, but for one GPU alone.
        cache_dir: Folder in which Hessians and solutions are kept for later runs with the same model and data, or None.
        cache_gb: Gigabytes (10^9 bytes) that its files may take; those unused for longest are removed first.
        resume: Keep solved layers beside the export until it is there: a run that is started again goes on behind them.
        **given: QuantizeConfig's fields, instead of `config`: ``QuantizeModule(bits=3)``.

    Attributes:
        config: The configuration.
        report: Of the last `quantize` or `round_to_nearest`; None before.
        allocated: The layers of the quantization under way, the with block of `temporarily` included; else None.
        run_log: Tells users what it does.

    Raises:
        ValueError: An option is unknown or out of range, or `true_sequential` is False.
        TypeError: Both `config` and fields are given.
    """

    def __init__(
        self,
        config: QuantizeConfig | None = None,
        *,
        offload_weights: bool | None = None,
        offload_activations: bool | None = None,
        exact_sums: bool | None = None,
        cache_dir: str | Path | None = None,
        cache_gb: float = 50.0,
        resume: bool = False,
        **given: Any,
    ):
        arguments.check_fields(config, given)
        self.config = config if config is not None else QuantizeConfig(**given)  # jsonargparse finds the fields here
        self.offload_weights, self.offload_activations = offload_weights, offload_activations
        self.exact_sums, self.cache_dir, self.cache_gb, self.resume = exact_sums, cache_dir, cache_gb, resume
        arguments.check_options(self.config, {name: getattr(self, name) for name in arguments.OPTIONS})
        self.report: QuantizeReport | None = None
        self.allocated: Allocated | None = None
        self.run_log = RunLog()
        self._sample: Sample | None = None  # of the calibration, for the export to prove itself with

    def check(self, model: nn.Module) -> tuple[list[Target], list[Skipped]]:
        """Refuses what cannot work, before any work; returns the layers to quantize and those that stay float.

        Raises:
            TargetError: See `targets.find_targets`.
        """
        with budgeted(model, self.config) as plan:
            return list(plan.targets), list(plan.skipped)

    def coverage(self, model: nn.Module) -> Coverage:
        """Returns and logs which parameters would be quantized, which stay float, and why; warns if most stay float.

        Raises:
            TargetError: See `targets.find_targets`.
        """
        with budgeted(model, self.config) as plan:
            return self.run_log.coverage(plan, again=True)

    def check_target(self, model: nn.Module, target: Client | str | Mapping[str, Any] | None) -> None:
        """Refuses a model whose export a client would not take; None is no client.

        Raises:
            ExportError: With all reasons, and what the client takes instead.
        """
        check_client(model, self.config, Client.of(target))

    def quantize(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        forward: ModelForward | None = None,
        tokenizer: Any = None,
        nsamples: int | None = None,
        device: torch.device | str | None = None,
        device_memory: int | None = None,
        export_dir: str | Path | None = None,
        overwrite: bool = False,
        target: Client | str | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> QuantizeReport:
        """Replaces the model's linear layers by QuantLinear, calibrated on `batches`.

        In a process group every rank calls this with the same model and its own batches; all get the same codes.

        Args:
            model: Any module; it stays on its device. Training flags are restored.
            batches: Texts, rows with texts or chats, token lists, or a dataloader's batches; see `calibration.collect`.
            forward: Runs one batch, called as forward(model, batch); `calibration.forward.call` when None.
            tokenizer: Called on texts, and saved with the export; or the folder or hub id to load it from.
            nsamples: Samples to use at most on this rank; `config.nsamples` shared over ranks when None.
            device: Where to compute; the model's device when None. A model on the CPU (or mapped from its files) may
                be larger than a GPU's memory: free memory, `offload_weights` and `offload_activations` decide what
                is moved, and the log tells.
            device_memory: Bytes of tensors that may be on a GPU at a time, present ones included; None is all that is
                free. The rest waits on the CPU. If even the least takes more, the report tells.
            export_dir: Also export there, as `export` does; layers are written while others are being quantized.
                Without a process group only. Layers on the CPU are mapped from its files afterwards: the folder may
                be deleted or replaced, but its files must not be written to while the model is in use.
            overwrite: As for `export`.
            target: The client that is to load the export: "vllm", "transformers", "sglang", "gptqmodel", or as
                `Client.of` takes it. What it would not take is refused before the work begins.
            progress: Called as progress(layers done, layers in all, names of the layers just quantized).

        Raises:
            TargetError: Nothing to quantize, or a layer contradicts the configuration.
            CalibrationError: The data is empty, too short, does not fit the model, or gives NaN.
            ExportError: `export_dir` cannot be written, or `target` would not take the export.
            RankError: Another rank was lost, or raised one of these or any other error.

        On any error before the result is told, the model and `export_dir` are as they were before.
        """
        options = PassOptions(forward, tokenizer, nsamples, device, device_memory, progress)
        with self.temporarily(
            model, batches, options, keep=True, export_dir=export_dir, overwrite=overwrite, target=target
        ) as report:
            self.exported = self.exported if export_dir is None else Path(export_dir)
        self.run_log.end(report, None if export_dir is None else Path(export_dir))
        return report

    def rehearse(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        forward: ModelForward | None = None,
        tokenizer: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        whole: bool = True,
        entire: Iterable[Any] | None = None,
    ) -> None:
        """Refuses, before a long run, what `quantize` would refuse of its data; a few batches run, and nothing changes.

        Args:
            model: As for `quantize`.
            batches: As for `quantize`.
            forward: As for `quantize`.
            tokenizer: As for `quantize`.
            device: As for `quantize`.
            whole: There will be no other calibration data, so its length is checked too.
            entire: Else all the data; read where `batches` leave in doubt that it is long enough. None is unknown.

        Raises:
            TargetError, CalibrationError: As `quantize`.
        """
        options = self._options(PassOptions(forward, tokenizer, device=device))
        ready = prepared(model, batches, self.config, options, alone=True)
        with undisturbed(), ready as (plan, calibration), evaluating(model):
            rehearse(plan, calibration, options, whole=whole, rest=rest_of(plan, entire, options))
            self.run_log.coverage(check_budget(plan, None))

    @contextlib.contextmanager
    def temporarily(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        options: PassOptions | None = None,
        *,
        keep: bool = False,
        export_dir: str | Path | None = None,
        overwrite: bool = False,
        target: Client | str | Mapping[str, Any] | None = None,
    ) -> Iterator[QuantizeReport]:
        """Quantizes a model inside a with block; afterwards it is float again. The float weights stay in memory.

        Args:
            model: As for `quantize`.
            batches: As for `quantize`.
            options: The other options of `quantize`, and where finished layers lie: see `PassOptions`.
            export_dir: As for `quantize`. The export is there after the block, unless that raises.
            overwrite: As for `quantize`.
            target: As for `quantize`.
            keep: Leave the model quantized, unless the block raises.
        """
        started, client, chosen = time.perf_counter(), Client.of(target), self._of_pass(options, export_dir)
        with contextlib.ExitStack() as around, contextlib.ExitStack() as inside:
            inside.enter_context(undisturbed())
            export_on_the_way.check(model, export_dir, overwrite)
            plan, calibration = around.enter_context(prepared(model, batches, self.config, chosen, client))
            inside.enter_context(evaluating(model))
            allocated = around.enter_context(self._under_way(allocate(plan, calibration, chosen, client)))
            plan = allocated.plan
            begun = export_on_the_way.Begun(plan, export_dir, overwrite, client, chosen)
            coverage = self.run_log.coverage(plan)
            ran = run_pass(plan, calibration, begun, around)
            layers, report, export = ran.layers, ran.report, begun.export
            report.note(coverage, allocated.record)
            self._sample = ran.one_pass.runs.sample()
            with swapped(plan, layers) as keep_them:
                plan.fuse()  # the experts that stay float
                report.seconds["total"] = time.perf_counter() - started
                self.report, self._reported = report, ModelOfReport(model)
                self.run_log.deviations(report)
                if export is not None:
                    export_on_the_way.finish(export, model, report, chosen.tokenizer, self._sample)
                inside.close()  # restores the training flags, of float layers too
                copy_training_flags(plan, layers)
                yield report
                place = export.place if export is not None else _nothing
                keep_them(place) if keep else place()
                self._forget(export is not None)
                self._finished = None if keep else self._finished

    def round_to_nearest(self, model: nn.Module) -> QuantizeReport:
        """Replaces the same layers by QuantLinear without calibration: the baseline GPTQ is compared with."""
        started = time.perf_counter()
        refuse_without_values(model)
        planning = planned(model, with_chosen_grids(self.config, self.report, "round_to_nearest"))
        with alone("quantization"), planning as plan, swapped(plan, rounded(plan)) as keep:
            report = rounded_report(plan)
            report.seconds["round-to-nearest"] = time.perf_counter() - started
            keep()
        self.report, self._reported, self._sample = report, ModelOfReport(model), None
        return report

    def export(
        self,
        model: nn.Module,
        directory: str | Path,
        *,
        tokenizer: Any = None,
        overwrite: bool = False,
        target: Client | str | Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes the quantized model as a folder; see `export.export_model`. On rank 0 only.

        Args:
            model: The quantized model.
            directory: Must not exist or be empty; see `overwrite`.
            tokenizer: Saved beside the model; as for `quantize`.
            overwrite: Replace an earlier export of this package; nothing else is ever replaced.
            target: As for `quantize`.
        """
        given: dict[str, Any] = {"tokenizer": tokenizer, "overwrite": overwrite, "target": target}
        given["config"] = with_chosen_grids(self.config, self.report, "export")
        folder = export_model(model, directory, report=self.report, sample=self._sample, **given)
        self.exported = folder
        self._forget(True)
        if self.allocated is None:  # else the run's end tells
            self.run_log.exported(self.report, Path(directory))
        return folder


def _nothing() -> None:
    pass
