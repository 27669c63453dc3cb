"""The last step of both commands: compares the float model, round-to-nearest and the export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from gptq_plugin.apps.data import TextData
from gptq_plugin.apps.evaluate import evaluate_export, mean_nll
from gptq_plugin.apps.language_model import LanguageModel
from gptq_plugin.apps.next_command import next_command
from gptq_plugin.apps.summary import SUMMARY, Clock, Summary, files_size, weights_size
from gptq_plugin.apps.sweeps import Objective, objective
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.paired import Measured, spread


@dataclass(frozen=True)
class Run:
    """A run of gptq-finetune or gptq-quantize.

    Attributes:
        cfg: The command's configuration; `evaluate` and `eval_batch_size` are read.
        folder: Given to the run by Hydra.
        clock: Measures its phases.
        data: Provides the validation windows.
        model: The float model.
    """

    cfg: DictConfig
    folder: Path
    clock: Clock
    data: TextData
    model: LanguageModel


def compare(
    run: Run, quantizer: QuantizeModule, report: QuantizeReport, export_dir: Path, device: torch.device
) -> Objective:
    """Evaluates the three models, and writes and prints the run's summary.

    Round-to-nearest is done in place: afterwards the float weights are gone.

    Args:
        run: The run.
        quantizer: Its quantizer.
        report: Report of the quantization.
        export_dir: The export.
        device: Where the export is evaluated; the float model too, if it is there.

    Returns:
        The export's mean NLL in nats, None if nothing is evaluated; or what else a sweep asks for (`sweeps.objective`).
    """
    float_bytes, float_dtype = weights_size(run.model.network)
    summary = Summary(
        bits=report.config.bits,
        group_size=report.config.group_size,
        float_bytes=float_bytes,
        float_dtype=float_dtype,
        gptq_bytes=files_size(export_dir),
        seconds=run.clock.seconds,
        deviations=report.deviation_lines(),
        bits_per_weight=None if report.allocation is None else report.bits_per_weight,
    )
    if run.cfg.evaluate:
        _evaluate(run, quantizer, export_dir, device, summary)
    summary.files = _files(run.folder, export_dir)
    summary.next_command = next_command(run.folder)
    summary.write(run.folder)
    print(f"\n{summary.table()}\n")
    return objective(summary.nll.get("gptq"), summary.gptq_bytes)


def _evaluate(run: Run, quantizer: QuantizeModule, export_dir: Path, device: torch.device, summary: Summary) -> None:
    windows, batch_size, network = run.data.validation, run.cfg.eval_batch_size, run.model.network
    summary.windows = (windows.shape[0], windows.shape[1])
    before = math.nan
    if run.model.device.type == device.type:
        with run.clock("evaluate float"):
            before = mean_nll(network, windows, batch_size)
            summary.nll["float"] = float(before)
        with run.clock("evaluate RTN"):
            quantizer.round_to_nearest(network)
            summary.nll["rtn"] = float(mean_nll(network, windows, batch_size))
    else:
        summary.deviations.append(f"the float model is not on {device}, so only its export is evaluated")
    with run.clock("reload, evaluate, generate"):
        result = evaluate_export(export_dir, run.folder, windows, batch_size=batch_size, device=str(device))
    after = Measured.mean(result["nlls"], [1.0] * len(result["nlls"]))
    summary.nll["gptq"] = float(after)
    summary.spread = spread(before, after)
    summary.prompt, summary.text = result["prompt"], result["text"]


def _files(run_dir: Path, export_dir: Path) -> dict[str, str]:
    places = {
        "GPTQ model": export_dir,
        "float model": run_dir / "float",
        "every layer": export_dir / "report.html",
        "this table": run_dir / SUMMARY,
    }
    return {what: str(path.resolve()) for what, path in places.items() if path.exists() or path.name == SUMMARY}
