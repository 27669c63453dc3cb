"""QuantizeModule: the order of the steps.

plan → refuse what cannot work → collect batches → one pass: find groups, then walk in lock-step, quantizing each layer
→ swap in QuantLinear → report → export.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Calibration, collect
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import refuse
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.export.export import Export, export_model
from gptq_plugin.export.staging import check_export_dir
from gptq_plugin.export.verify_outputs import Sample
from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.layers.qlinear import QuantLinear, swap_modules
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.experts import learn_layouts, undeclared
from gptq_plugin.model.plan import Plan, planned
from gptq_plugin.model.targets import Skipped, Target
from gptq_plugin.quantize.in_place import describe, swapped
from gptq_plugin.quantize.one_pass import OnePass, float_reports, module_report
from gptq_plugin.quantize.options import ModelForward, PassOptions, Progress
from gptq_plugin.report.coverage import Coverage
from gptq_plugin.report.report import ModuleReport, QuantizeReport

log = logging.getLogger(__name__)


class QuantizeModule:
    """Quantizes a model in place with GPTQ and exports it.

    Args:
        config: What to quantize and how; a QuantizeConfig, or nothing.
        offload_weights: True copies the model's weights to the device block by block while it is quantized, so that a
            model larger than the device's memory can be; False keeps all there. None decides from free memory. Only
            for models that live elsewhere than the device: see `quantize`.
        offload_activations: True keeps the activations of waiting calibration batches on the CPU, False on the device;
            None keeps as many on the device as fit.
        **fields: QuantizeConfig's fields, instead of `config`: ``QuantizeModule(bits=3)``.

    Attributes:
        config: The configuration.
        report: What the last `quantize` or `round_to_nearest` did; None before.
        plan: Of the quantization that is going on, `temporarily`'s with block included; else None.

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
        **fields: Any,
    ):
        if config is not None and fields:
            raise TypeError(f"give a QuantizeConfig or its fields, not both: got {', '.join(fields)} beside config")
        self.config = config if config is not None else QuantizeConfig.from_dict(fields)
        if not self.config.true_sequential:
            raise ValueError(
                "true_sequential=False saves time in tools that would run the model once more for every layer. "
                "Lock-step calibration gives true_sequential=True in one pass: leave the option out"
            )
        for name, value in (("offload_weights", offload_weights), ("offload_activations", offload_activations)):
            if not (value is None or isinstance(value, bool)):
                raise ValueError(f"{name} must be true, false or null (decide from free memory), got {value!r}")
        self.offload_weights = offload_weights
        self.offload_activations = offload_activations
        self.report: QuantizeReport | None = None
        self.plan: Plan | None = None
        self._sample: Sample | None = None  # of the calibration, for the export to prove itself with

    def check(self, model: nn.Module) -> tuple[list[Target], list[Skipped]]:
        """Refuses what cannot work before any work is done; returns what would be quantized and what not.

        Raises:
            TargetError: See `targets.find_targets`.
        """
        with planned(model, self.config) as plan:
            return list(plan.targets), list(plan.skipped)

    def coverage(self, model: nn.Module) -> Coverage:
        """Which of the float model's parameters would be quantized, and which not, and why. It is logged, as a warning
        if most of the export would be float.

        Raises:
            TargetError: See `targets.find_targets`.
        """
        with planned(model, self.config) as plan:
            return _covered(plan)

    def check_target(self, model: nn.Module, target: Client | str | Mapping[str, Any] | None) -> None:
        """Refuses now what a client would not take of the quantized model's export; None is no client.

        Raises:
            ExportError: With all its reasons, and what it takes instead.
        """
        client = Client.of(target)
        if client is not None:
            with planned(model, self.config) as plan:
                _refuse(plan, client)

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

        In a process group every rank calls this with the same model and batches of its own; all end with
        the same codes.

        Args:
            model: Any module; it stays on its device. Training flags are restored.
            batches: Texts (with `tokenizer`), token lists, or a dataloader's batches; see
                `calibration.collect`.
            forward: How to run one batch, called as forward(model, batch); `forward.call` when None.
            tokenizer: Called on texts, and saved with the export.
            nsamples: Samples to use at most on this rank; `config.nsamples` shared over ranks when None.
            device: Where to compute, when that is not where the model is: a model on the CPU (or mapped from its
                files) may be larger than a GPU's memory. What is moved when is in the log; `offload_weights` and
                `offload_activations` decide otherwise.
            device_memory: Bytes of tensors that may be on a GPU at a time, those that are there already included. What
                waits is kept on the CPU as far as that needs; None uses what is free. Where even the least takes more,
                the report says so.
            export_dir: Also export there, as `export` does; layers are written while others are being quantized.
                On one rank only. Layers on the CPU then are mappings of those files: delete or replace the folder as
                you like, but do not write into its files while the model is in use.
            overwrite: As for `export`.
            target: The client that is to load the export ("vllm", "transformers", "sglang", "gptqmodel", or as
                `Client.of` takes it): what it would not take is refused before the work begins.
            progress: Called as progress(layers done, layers in all, what is being done).

        Raises:
            TargetError: Nothing to quantize, or a layer contradicts the configuration.
            CalibrationError: The data is empty, too short, does not fit the model, or gives NaN.
            ExportError: `export_dir` cannot be written, or `target` would not take the export.
            RankError: One of these, or any other error, ended another rank, or that was lost.

        On any error the model is as it was before, and so is `export_dir`.
        """
        quantized = self.temporarily(
            model,
            batches,
            keep=True,
            export_dir=export_dir,
            overwrite=overwrite,
            target=target,
            forward=forward,
            tokenizer=tokenizer,
            nsamples=nsamples,
            device=device,
            device_memory=device_memory,
            progress=progress,
        )
        with quantized as report:
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
    ) -> None:
        """Refuses now what `quantize` would refuse for its data: one batch runs, and nothing changes.

        For the start of a long run that ends in `quantize`. In a process group every rank calls it.

        Args:
            model, batches, forward, tokenizer, device: As for `quantize`.
            whole: `batches` is all the calibration data there will be, so its length is judged too.

        Raises:
            TargetError, CalibrationError: As `quantize`.
        """
        options = self._options(forward=forward, tokenizer=tokenizer, device=device)
        with distributed.ending_together(), evaluating(model), contextlib.ExitStack() as around:
            plan, calibration = self._prepare(around, model, batches, options)
            OnePass(plan, calibration, options).rehearse(whole)
            _covered(plan)

    @contextlib.contextmanager
    def temporarily(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        keep: bool = False,
        export_dir: str | Path | None = None,
        overwrite: bool = False,
        target: Client | str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[QuantizeReport]:
        """Like `quantize`, for the length of a with block; afterwards the model is float again.

        The float weights stay in memory meanwhile.

        Args:
            model, batches, export_dir, overwrite, target: As for `quantize`.
            keep: The model stays quantized, unless the block raises.
            options: `quantize`'s others, and `layers_in`: a `SharedLayers` that holds the layers of a model on the CPU
                for all ranks of a node.
        """
        started = time.perf_counter()
        client, chosen = Client.of(target), self._options(**options)
        with contextlib.ExitStack() as around, contextlib.ExitStack() as inside:
            inside.enter_context(distributed.ending_together())
            _check_export_dir(export_dir, overwrite)
            plan, calibration = self._prepare(around, model, batches, chosen, client)
            self.plan = plan
            around.callback(setattr, self, "plan", None)
            export = None
            if export_dir is not None:
                export = Export(plan.structure, export_dir, self.config, overwrite=overwrite, target=client)
                chosen = dataclasses.replace(chosen, layers_in=inside.enter_context(export))
                export.check(one.name for one in plan.targets)
            inside.enter_context(evaluating(model))
            one_pass, coverage = OnePass(plan, calibration, chosen), _covered(plan)
            layers, report = one_pass.run()
            report.coverage = coverage
            self._sample = _sample(calibration, one_pass)
            with swapped(plan, layers) as keep_them:
                plan.fuse()  # the experts that stay float
                report.seconds["total"] = time.perf_counter() - started
                self.report = report
                _log(report)
                if export is not None:
                    written = time.perf_counter()
                    export.finish(model, report=report, tokenizer=chosen.tokenizer, sample=self._sample)
                    report.seconds["export"] = time.perf_counter() - written
                inside.close()  # restores the training flags
                for one in plan.targets:
                    if one.name in layers:
                        layers[one.name].train(one.module.training)
                yield report
                if keep:
                    keep_them()

    def round_to_nearest(self, model: nn.Module) -> QuantizeReport:
        """Replaces the same layers by QuantLinear without calibration: the baseline GPTQ is compared with."""
        started = time.perf_counter()
        layers: dict[str, QuantLinear] = {}
        modules: list[ModuleReport] = []
        with planned(model, self.config) as plan:
            for target in plan.targets:
                quantized = round_to_nearest(target.weight, target.config)
                layers[target.name] = QuantLinear.from_quantized(quantized, target.bias, target.parameter.dtype)
                modules.append(module_report(target, method="rtn"))
            swap_modules(model, layers)
            describe(plan.structure, layers, self.config)
        self._sample = None
        self.report = QuantizeReport(self.config, modules + float_reports(plan.skipped))
        self.report.seconds["round-to-nearest"] = time.perf_counter() - started
        return self.report

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
            directory: Target folder; must not exist, or be empty, unless `overwrite` and it is an export.
            tokenizer: Saved beside the model.
            overwrite: Replace an earlier export.
            target: As for `quantize`.
        """
        return export_model(
            model,
            directory,
            self.config,
            report=self.report,
            tokenizer=tokenizer,
            overwrite=overwrite,
            sample=self._sample,
            target=target,
        )

    def _options(self, **given: Any) -> PassOptions:
        return PassOptions(offload_weights=self.offload_weights, offload_activations=self.offload_activations, **given)

    def _prepare(
        self,
        around: contextlib.ExitStack,
        model: nn.Module,
        batches: Iterable[Any],
        options: PassOptions,
        client: Client | None = None,
    ) -> tuple[Plan, Calibration]:
        """Plans the quantization, refuses what cannot work, and only then collects the batches.

        A model that does not declare how it uses its experts is planned after a batch has run through it.

        Args:
            around: Keeps the experts apart.
        """
        calibration = None
        if undeclared(model):
            self.check_target(model, client)
            calibration = self._collect(batches, options)
            self._learn(model, calibration, options)
        plan = around.enter_context(planned(model, self.config))
        _refuse(plan, client)
        return plan, self._collect(batches, options) if calibration is None else calibration

    def _collect(self, batches: Iterable[Any], options: PassOptions) -> Calibration:
        nsamples = share(self.config.nsamples) if options.nsamples is None else options.nsamples
        return collect(batches, self.config, options.tokenizer, nsamples)

    def _learn(self, model: nn.Module, calibration: Calibration, options: PassOptions) -> None:
        """Learns how the model uses its experts from its first batch; every rank has the same model, and runs its own
        batch."""

        def first() -> None:
            run = options.runner(every_logit=self.config.lm_head)
            with evaluating(model), streamed_to(model, options.where), torch.no_grad():
                run(model, calibration.batches[0].data)

        if calibration.batches:
            learn_layouts(model, first)


def share(total: int) -> int:
    """This rank's part of `total` samples; the parts of all ranks add up to it."""
    size, rank = distributed.world_size(), distributed.rank()
    return total // size + (rank < total % size)


def _check_export_dir(export_dir: str | Path | None, overwrite: bool) -> None:
    if export_dir is None:
        return
    if distributed.active():
        raise ValueError("export_dir is for one process; under DDP call export on rank 0 afterwards")
    check_export_dir(export_dir, overwrite)


def _refuse(plan: Plan, client: Client | None) -> None:
    if client is not None:
        refuse(Inventory.of_plan(plan), client)


def _covered(plan: Plan) -> Coverage:
    packed = sum(stored_bytes(target.weight.shape, target.config) for target in plan.targets)
    found = Coverage.of(plan, packed)
    log.log(logging.WARNING if found.mostly_float else logging.INFO, found.summary())
    return found


def _sample(calibration: Calibration, one_pass: OnePass) -> Sample | None:
    """The first batch, which an export has to give the same outputs for; None without batches."""
    first = calibration.batches[:1]
    return Sample.of(first[0].data, one_pass.forward, one_pass.device) if first else None


def _log(report: QuantizeReport) -> None:
    for deviation in report.all_deviations():
        log.warning("%s", deviation)
    log.info("quantized in %.1f s\n%s", report.seconds["total"], report.table())
