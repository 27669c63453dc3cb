"""A report in the trainer's loggers: `log_report`.

Tested by tests/lightning/test_callback_quality.py: with the reports of runs.
"""

from __future__ import annotations

import lightning.pytorch as pl

from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.log_metrics import finish_metrics, layer_metrics, quality_metrics, total_metrics


def log_report(trainer: pl.Trainer, report: QuantizeReport) -> None:
    """Logs totals, layers and quality at the run's last step, and the steps of a finish as if they followed it."""
    metrics = total_metrics(report) | layer_metrics(report) | quality_metrics(report)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        for steps, judged in finish_metrics(report):
            logger.log_metrics(judged, step=trainer.global_step + steps)
        logger.save()
