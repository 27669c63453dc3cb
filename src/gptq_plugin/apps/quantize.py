"""``gptq-quantize``: the order of its steps.

Tested by tests/apps/test_cli.py: by runs of the command.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from gptq_plugin.apps.comparison import Run, compare
from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.apps.run_folder import launched, refuse_new_folder
from gptq_plugin.apps.setting_up import data_and_model, instantiate_plain, plain, start
from gptq_plugin.apps.summary import Clock
from gptq_plugin.apps.sweeps import Objective, check_objectives
from gptq_plugin.calibration.sources import Sources
from gptq_plugin.device.named import device_named
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.finish.options import check_finish
from gptq_plugin.memory.placement import fits
from gptq_plugin.options import fields
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.finish_run import FinishRun
from gptq_plugin.training.progress import tqdm_progress


def quantize(cfg: DictConfig) -> Objective:
    """Quantizes a model, fine-tuned or not, exports, reloads and compares; returns the exported model's mean NLL."""
    clock, run_dir = Clock(), start(cfg)
    check_objectives(cfg.evaluate)
    if launched() > 1:
        raise ValueError(
            f"gptq-quantize is one process, and {launched()} were started: run it without torchrun or srun (a model "
            "larger than the GPU is streamed through it); gptq-finetune quantizes on all ranks"
        )
    export_dir = Path(cfg.export_dir)
    check_export_dir(export_dir, overwrite=cfg.overwrite)
    if cfg.ckpt is None and cfg.model.get("weights") is False:
        raise ValueError("model.weights=false leaves the model's weights random: give ckpt=PATH to load them from")
    with clock("prepare"):
        quantizer = instantiate_plain(cfg.quantizer)
        fields.of_type("a QuantizeModule, as in conf/quantizer/", QuantizeModule).check("quantizer", quantizer)
        refuse_new_folder(quantizer, export_dir)
        finish = check_finish(instantiate_plain(cfg.finish))
        data, model = data_and_model(cfg)
        model.network = fine_tuned(model.network, ckpt=cfg.ckpt, adapter=cfg.adapter)
        device = _device(cfg.device)
        if not quantizer.offload_weights and fits(model, device):
            model.to(device)  # otherwise it is streamed from the CPU
        rows = data.calibration_source(quantizer.config.nsamples)
        samples = finish.data_config(quantizer.config).nsamples
        finish_run = FinishRun(finish, lambda: data.calibration_source(samples)) if finish.kind != "none" else None
    with clock("quantize"), tqdm_progress() as progress:
        options = PassOptions(tokenizer=model.tokenizer, device=device, progress=progress, export_dir=export_dir)
        to = Destination(export_dir, cfg.overwrite, plain(cfg.target))
        report = _quantized(quantizer, model.network, rows, options, to, finish_run)
    quantizer.run_log.end(report, export_dir)
    clock.move(report.seconds["export"], "quantize", "export")
    return compare(Run(cfg, run_dir, clock, data, model), quantizer, report, export_dir, device)


class Destination(NamedTuple):
    """Where the export goes, as `QuantizeModule.export` takes it."""

    directory: Path
    overwrite: bool
    target: Any


def _quantized(
    quantizer: QuantizeModule,
    network: nn.Module,
    rows: Sources,
    options: PassOptions,
    to: Destination,
    finish: FinishRun | None,
) -> QuantizeReport:
    """Quantizes and exports; with a finish, exports what GPTQ gave, and puts the finished model in its place."""
    if finish is None:
        with quantizer.temporarily(
            network, rows, options, export_dir=to.directory, overwrite=to.overwrite, target=to.target
        ) as report:
            return report
    with quantizer.temporarily(network, rows, options, target=to.target) as report:
        started = time.perf_counter()
        given = {"tokenizer": options.tokenizer, "target": to.target}
        quantizer.export(network, to.directory, overwrite=to.overwrite, **given)
        report.seconds["export"] = time.perf_counter() - started
        finish.run(quantizer, network, options, exported=True)
        started = time.perf_counter()
        quantizer.export(network, to.directory, overwrite=True, **given)
        report.seconds["export"] += time.perf_counter() - started
        return report


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return device_named(name)
