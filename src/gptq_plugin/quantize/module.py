"""QuantizeModule: the order of the steps.

find targets → collect batches → the job: plan, then walk in lock-step, quantizing each layer → swap in
QuantLinear → report → export.
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
from gptq_plugin.calibration.batches import to_device
from gptq_plugin.calibration.collect import Calibration, collect
from gptq_plugin.calibration.forward import call, evaluating
from gptq_plugin.checkpoint.description import client_config
from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import refuse
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.memory import numbered
from gptq_plugin.errors import TargetError, some
from gptq_plugin.export.export import Export, export_model
from gptq_plugin.export.staging import check_export_dir
from gptq_plugin.export.verify_outputs import Sample
from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.layers.qlinear import QuantLinear, swap_modules
from gptq_plugin.memory.shared_layers import SharedLayers
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.experts import learn_layouts, unfused
from gptq_plugin.model.hf_models import transformers_models
from gptq_plugin.model.targets import Skipped, Target, find_targets
from gptq_plugin.quantize.one_pass import ModelForward, OnePass, Progress, float_reports, module_report
from gptq_plugin.report.coverage import Coverage, coverage
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
        self._sample: Sample | None = None  # of the calibration, for the export to prove itself with

    def check(self, model: nn.Module) -> tuple[list[Target], list[Skipped]]:
        """Refuses what cannot work before any work is done; returns what would be quantized and what not.

        Raises:
            TargetError: See `targets.find_targets`.
        """
        with unfused(model):
            return find_targets(model, self.config)

    def coverage(self, model: nn.Module) -> Coverage:
        """What of the float model's parameters would be quantized and what not, and why; logs it, as a warning where
        most of the export would be float.

        Raises:
            TargetError: See `targets.find_targets`.
        """
        with unfused(model):
            return _covered(model, *self.check(model))

    def check_target(self, model: nn.Module, target: Client | str | Mapping[str, Any] | None) -> None:
        """Refuses now what a client would not take of the quantized model's export; None is no client.

        Raises:
            ExportError: With all its reasons, and what it takes instead.
        """
        client = Client.of(target)
        if client is not None:
            with unfused(model):
                refuse(Inventory.of_model(model, self.config), client)

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
        options = {
            "forward": forward,
            "tokenizer": tokenizer,
            "nsamples": nsamples,
            "device": device,
            "device_memory": device_memory,
            "export_dir": export_dir,
            "overwrite": overwrite,
            "target": target,
            "progress": progress,
        }
        with self.temporarily(model, batches, keep=True, **options) as report:
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
        with distributed.ending_together(), evaluating(model):
            run = self._run(forward, device)
            calibration = self._collect(batches, tokenizer)
            self._learn(model, calibration, run, device)
            with unfused(model):
                job = self._job(model, calibration, run, device=device)
                job.rehearse(whole)
                _covered(model, job.targets, job.skipped)

    @contextlib.contextmanager
    def temporarily(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        keep: bool = False,
        forward: ModelForward | None = None,
        tokenizer: Any = None,
        nsamples: int | None = None,
        device: torch.device | str | None = None,
        export_dir: str | Path | None = None,
        overwrite: bool = False,
        target: Client | str | Mapping[str, Any] | None = None,
        layers_in: SharedLayers | None = None,
        **options: Any,
    ) -> Iterator[QuantizeReport]:
        """Like `quantize`, for the length of a with block; afterwards the model is float again.

        With `keep` it stays quantized, unless the block raises. The float weights stay in memory meanwhile. With
        `layers_in` the layers of a model on the CPU lie there, for all ranks of a node.
        """
        started = time.perf_counter()
        with contextlib.ExitStack() as around, contextlib.ExitStack() as stack:
            stack.enter_context(distributed.ending_together())
            if export_dir is not None:
                if distributed.active():
                    raise ValueError("export_dir is for one process; under DDP call export on rank 0 afterwards")
                check_export_dir(export_dir, overwrite)
            self.check_target(model, target)
            run = self._run(forward, device)
            calibration = self._collect(batches, tokenizer, nsamples)
            self._learn(model, calibration, run, device)
            put_together = around.enter_context(unfused(model))
            export = None
            if export_dir is not None:
                export = stack.enter_context(Export(model, export_dir, self.config, overwrite=overwrite, target=target))
            stack.enter_context(evaluating(model))
            job = self._job(model, calibration, run, device=device, layers_in=export or layers_in, **options)
            planned = _covered(model, job.targets, job.skipped)
            if export is not None:
                export.check(target.name for target in job.targets)
            layers, report = job.run()
            report.coverage = planned
            first = calibration.batches[:1]
            self._sample = Sample.of(first[0].data, run, job.device) if first else None
            floats = {target.name: target.module for target in job.targets if target.name in layers}
            with _swapped(model, layers, floats, self.config) as keep_them:
                put_together()  # the experts that stay float
                report.seconds["total"] = time.perf_counter() - started
                self.report = report
                for deviation in report.all_deviations():
                    log.warning("%s", deviation)
                log.info("quantized in %.1f s\n%s", report.seconds["total"], report.table())
                if export is not None:
                    written = time.perf_counter()
                    export.finish(model, report=report, tokenizer=tokenizer, sample=self._sample)
                    report.seconds["export"] = time.perf_counter() - written
                stack.close()  # the training flags, before anybody looks
                for name, module in floats.items():
                    layers[name].train(module.training)
                yield report
                if keep:
                    keep_them()

    def round_to_nearest(self, model: nn.Module) -> QuantizeReport:
        """Replaces the same layers by QuantLinear without calibration: the baseline GPTQ is compared with."""
        started = time.perf_counter()
        layers: dict[str, QuantLinear] = {}
        modules: list[ModuleReport] = []
        with unfused(model):
            targets, skipped = self.check(model)
            for target in targets:
                quantized = round_to_nearest(target.weight, target.config)
                layers[target.name] = QuantLinear.from_quantized(quantized, target.bias, target.parameter.dtype)
                modules.append(module_report(target, method="rtn"))
            swap_modules(model, layers)
        _describe(model, layers, self.config)
        self._sample = None
        self.report = QuantizeReport(self.config, modules + float_reports(skipped))
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

    def _run(self, forward: ModelForward | None, device: torch.device | str | None) -> ModelForward:
        """How a batch is run, and brought to the device."""
        where = None if device is None else numbered(torch.device(device))

        def run(model: nn.Module, batch: Any) -> Any:
            if forward is None:
                return call(model, batch, every_logit=self.config.lm_head, device=where)
            return forward(model, batch if where is None else to_device(batch, where))

        return run

    def _collect(self, data: Iterable[Any], tokenizer: Any, nsamples: int | None = None) -> Calibration:
        return collect(data, self.config, tokenizer, share(self.config.nsamples) if nsamples is None else nsamples)

    def _learn(
        self, model: nn.Module, calibration: Calibration, run: ModelForward, device: torch.device | str | None
    ) -> None:
        """How experts' parameters are used that do not say it themselves. Ranks have the same model and run each its
        own first batch."""

        def first() -> None:
            with (
                evaluating(model),
                streamed_to(model, None if device is None else torch.device(device)),
                torch.no_grad(),
            ):
                run(model, calibration.batches[0].data)

        if calibration.batches:
            learn_layouts(model, first)

    def _job(
        self,
        model: nn.Module,
        calibration: Calibration,
        run: ModelForward,
        *,
        device: torch.device | str | None = None,
        device_memory: int | None = None,
        progress: Progress | None = None,
        layers_in: Any = None,
    ) -> OnePass:
        targets, skipped = self.check(model)
        devices = {str(target.weight.device): target.name for target in targets}
        if len(devices) > 1:
            raise TargetError(
                f"the layers to quantize are on several devices ({some([f'{n} on {d}' for d, n in devices.items()])}): "
                "move the model to one, or load it on the CPU and give quantize(..., device='cuda')"
            )
        home = targets[0].weight.device
        where = numbered(torch.device(device)) if device is not None else home
        if self.offload_weights and where.type == home.type == "cuda":
            raise ValueError(
                f"offload_weights=True streams a model from the CPU, and this one is on {home}: call model.to('cpu') "
                f"first, and give quantize(..., device={str(where)!r})"
            )
        return OnePass(
            self.config,
            model,
            targets,
            skipped,
            calibration,
            where,
            run,
            progress or _quiet,
            self.offload_weights,
            self.offload_activations,
            device_memory,
            layers_in,
        )


def _covered(model: nn.Module, targets: list[Target], skipped: list[Skipped]) -> Coverage:
    packed = sum(stored_bytes(target.weight.shape, target.config) for target in targets)
    found = coverage(model, targets, skipped, packed)
    log.log(logging.WARNING if found.mostly_float else logging.INFO, found.summary())
    return found


@contextlib.contextmanager
def _swapped(
    model: nn.Module, layers: dict[str, QuantLinear], floats: dict[str, nn.Module], config: QuantizeConfig
) -> Iterator[Callable[[], None]]:
    """The quantized layers in the model's tree; afterwards the float ones, unless what it yields was called."""
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True

    try:
        swap_modules(model, layers)
        _describe(model, layers, config)
        yield keep
    finally:
        if not kept:
            swap_modules(model, floats)
            _describe(model, {}, config)


def share(total: int) -> int:
    """This rank's part of `total` samples; the parts of all ranks add up to it."""
    size, rank = distributed.world_size(), distributed.rank()
    return total // size + (rank < total % size)


def _describe(model: nn.Module, layers: dict[str, QuantLinear], config: QuantizeConfig) -> None:
    """Lets a transformers model's config say what is quantized, as the memory holds it (true zeros), so that a
    `save_pretrained` of the user's own writes a checkpoint that loads; without layers, takes that back."""
    inner: Any
    for name, inner in transformers_models(model):
        prefix = f"{name}." if name else ""
        within = {n.removeprefix(prefix): layer for n, layer in layers.items() if n.startswith(prefix)}
        if within:
            in_memory = dataclasses.replace(config, checkpoint_format="gptq_v2")
            inner.config.quantization_config = client_config(inner, within, in_memory)
        elif hasattr(inner.config, "quantization_config"):
            del inner.config.quantization_config


def _quiet(done: int, total: int, what: str) -> None:
    pass
