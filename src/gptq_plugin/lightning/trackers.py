"""What loggers get at the end of a run: totals as metrics, the layers as one table, the export as an artifact.

Lightning's loggers for Weights & Biases, MLflow, TensorBoard and CSV files are known by their methods; any other logger
gets each layer's numbers as metrics.
"""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from gptq_plugin.checkpoint.files import QUANTIZE_CONFIG
from gptq_plugin.errors import brief
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.log_metrics import (
    Table,
    finish_metrics,
    layer_metrics,
    layers_table,
    quality_metrics,
    total_metrics,
)

log = logging.getLogger(__name__)

LAYERS = "gptq/layers"
_BESIDE = ("report.html", QUANTIZE_CONFIG)  # what loggers of files keep of an export, which lies on the disk already


def log_report(
    trainer: pl.Trainer, report: QuantizeReport, export_dir: Path | None, log_artifacts: bool | str = False
) -> None:
    """Logs a result to every logger of the trainer, and adds its metrics to `trainer.callback_metrics`.

    What a tracker does not take is told in the log, and the run goes on.

    Args:
        trainer: The trainer after its fit.
        report: The result.
        export_dir: The export; None if there is none.
        log_artifacts: Also the export, under this name; True names it "gptq".
    """
    metrics = total_metrics(report) | quality_metrics(report)
    trainer.callback_metrics.update({name: torch.tensor(value, device="cpu") for name, value in metrics.items()})
    for logger in trainer.loggers:
        _tried(logger, "metrics", partial(_log_metrics, trainer, logger, report, metrics))
        if not trainer.is_global_zero:  # Lightning's take nothing there
            continue
        _tried(logger, "the table of layers", partial(_log_table, logger, report, trainer.global_step))
        if log_artifacts and export_dir is not None:
            name = log_artifacts if isinstance(log_artifacts, str) else ""
            _tried(logger, f"the export {export_dir}", partial(_log_export, logger, export_dir, name))


def _tried(logger: Any, what: str, act: Callable[[], None]) -> None:
    try:
        act()
    except Exception as error:  # noqa: BLE001  a tracker's: the export is there
        log.error("%s could not be logged to %s: %s", what, type(logger).__name__, brief(error))


def _log_metrics(trainer: pl.Trainer, logger: Any, report: QuantizeReport, totals: dict[str, float]) -> None:
    has_table = trainer.is_global_zero and _table_writer(logger) is not None
    logger.log_metrics(totals if has_table else totals | layer_metrics(report), step=trainer.global_step)
    for steps, judged in finish_metrics(report):  # as if they followed the run's
        logger.log_metrics(judged, step=trainer.global_step + steps)
    logger.save()


def _log_table(logger: Any, report: QuantizeReport, step: int) -> None:
    write = _table_writer(logger)
    if write is not None:
        write(layers_table(report), step)


def _table_writer(logger: Any) -> Callable[[Table, int], None] | None:
    """How a logger takes a table; None if it does not."""
    kind = _kind(logger)
    if kind == "wandb":
        return lambda table, step: logger.log_table(LAYERS, columns=table.columns, data=table.rows, step=step)
    if kind == "mlflow":
        return lambda table, step: logger.experiment.log_table(logger.run_id, table.by_column(), f"{LAYERS}.json")
    if kind == "tensorboard":
        return lambda table, step: logger.experiment.add_text(LAYERS, table.markdown(), step)
    if kind == "csv":
        return lambda table, step: _write_csv(table, Path(logger.log_dir) / f"{LAYERS}.csv")
    return None


def _log_export(logger: Any, export_dir: Path, name: str) -> None:
    kind = _kind(logger)
    if kind == "wandb":
        artifact = import_module("wandb").Artifact(name or "gptq", type="model")
        artifact.add_dir(str(export_dir))
        logger.experiment.log_artifact(artifact)
    elif kind == "mlflow":
        logger.experiment.log_artifacts(logger.run_id, str(export_dir), "gptq")
        if name:
            _register(logger, name)
    elif kind in ("tensorboard", "csv"):
        folder = Path(logger.log_dir) / "gptq"
        folder.mkdir(parents=True, exist_ok=True)
        for file in _BESIDE:
            if (export_dir / file).exists():
                shutil.copy(export_dir / file, folder / file)
    else:
        raise NotImplementedError("this logger has no artifacts that are known here: upload the folder yourself")


def _register(logger: Any, name: str) -> None:
    """Makes the logged export a version of a model in MLflow's registry."""
    client = logger.experiment
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name)
    source = f"{client.get_run(logger.run_id).info.artifact_uri}/gptq"
    client.create_model_version(name, source, logger.run_id)


def _write_csv(table: Table, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([table.columns, *table.rows])


def _kind(logger: Any) -> str:
    """Which tracker is behind a logger, by the methods it has; "" is none of them."""
    experiment = logger.experiment
    if callable(getattr(logger, "log_table", None)):
        return "wandb"
    if callable(getattr(experiment, "log_table", None)) and callable(getattr(experiment, "log_artifacts", None)):
        return "mlflow"
    if callable(getattr(experiment, "add_text", None)):
        return "tensorboard"
    return "csv" if hasattr(experiment, "metrics_file_path") else ""
