"""Writes benchmarks' results into an export: report, page, model card and quantize_config.json."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.files import QUANTIZE_CONFIG, write_json
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.errors import ExportError
from gptq_plugin.export.side_files import CARD, PAGE, REPORT, export_card, write_report
from gptq_plugin.options.limited_files import read_text
from gptq_plugin.report.benchmark import Benchmark
from gptq_plugin.report.merged_text import merged
from gptq_plugin.report.model_card import ModelFacts
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.report.spread import Spread
from gptq_plugin.report.stored_report import read_report

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's result.

    Attributes:
        benchmark: How it was measured.
        before: The float model's value; NaN if it was not evaluated.
        after: The quantized model's.
        spread: How well the change is known; None if that cannot be told.
    """

    benchmark: Benchmark
    before: float
    after: float
    spread: Spread | None = None


def with_results(report: QuantizeReport, results: Mapping[str, BenchmarkResult]) -> QuantizeReport:
    """The report with these metrics beside its own; those of the same names are replaced."""
    metrics, spreads = dict(report.metrics), {name: one for name, one in report.spreads.items() if name not in results}
    for name, result in results.items():
        both = {"float": result.before, "gptq": result.after}
        metrics[name] = {model: value for model, value in both.items() if not math.isnan(value)}
        if result.spread is not None:
            spreads[name] = result.spread
    benchmarks = report.benchmarks | {name: result.benchmark for name, result in results.items()}
    return dataclasses.replace(report, metrics=metrics, spreads=spreads, benchmarks=benchmarks)


def check_results(directory: Path) -> tuple[QuantizeReport, ModelFacts, str]:
    """The report, facts and card of an export that results can be written into.

    Raises:
        ExportError: It has no report of this version.
    """
    try:
        return *read_report(read_text(directory / REPORT)), read_text(directory / CARD)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{directory} has no report of this version, into which results could be written: {error}"
        ) from error


def write_results(directory: Path, results: Mapping[str, BenchmarkResult]) -> None:
    """Adds results to an export. Each file is replaced as a whole; the weights and config.json are not touched.

    What a person changed in the card stays; a warning names lines that this keeps out.

    Args:
        directory: An export of this package, with a report.
        results: By the names of their metrics.

    Raises:
        ExportError: The folder has no report of this version.
        CheckpointError: The folder holds no checkpoint.
    """
    checkpoint = Checkpoint.open(directory)
    before, facts, card = check_results(directory)
    settings = checkpoint.format.settings(checkpoint.quantization, before.config)
    after = with_results(before, results)
    text, lost = merged(export_card(before, facts, settings), card, export_card(after, facts, settings))
    if lost:
        log.warning("%s: lines changed by hand are kept; with the results they would be:\n%s", CARD, "\n".join(lost))
    files = [REPORT, PAGE, CARD]
    with TemporaryDirectory(prefix=".", dir=directory) as made:
        staging = Path(made)
        write_report(staging, after, facts, settings, text)
        config = dict(checkpoint.quantize_config or {})
        ours = (config.get("meta") or {}).get(QUANTIZER_NAME)
        if ours is not None:
            plain = after.to_dict()
            ours = {**ours, "metrics": plain["metrics"], "benchmarks": plain["benchmarks"]}
            write_json(staging / QUANTIZE_CONFIG, {**config, "meta": {**config["meta"], QUANTIZER_NAME: ours}})
            files.append(QUANTIZE_CONFIG)
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # somebody has removed it
                (staging / name).chmod((directory / name).stat().st_mode)
            os.replace(staging / name, directory / name)
