"""Tells users of a quantization, each thing once and on rank 0 only: `RunLog`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from gptq_plugin import distributed
from gptq_plugin.checkpoint.sizes import target_bytes
from gptq_plugin.model.plan import Plan
from gptq_plugin.report.coverage import Coverage, FloatWeight
from gptq_plugin.report.ending import ending, exported, layers_shown
from gptq_plugin.report.notice import show, warn
from gptq_plugin.report.report import QuantizeReport

log = logging.getLogger(__name__)


class RunLog:
    """The log of one run: from the checks before training, through every attempt, to the end."""

    def __init__(self) -> None:
        self._floats: Sequence[FloatWeight] | None = None  # logged in this run
        self._warnings: set[str] = set()  # given in this run

    def coverage(self, plan: Plan, *, again: bool = False) -> Coverage:
        """Returns which parameters stay float, and why, and logs that once in a run.

        The log is a warning if most of the export will be float.

        Args:
            plan: The layers.
            again: Log it even if this run has.
        """
        found = Coverage.of(plan, sum(map(target_bytes, plan.targets)))
        if again or found.floats != self._floats:
            self._floats = found.floats
            if distributed.rank() == 0:
                log.log(logging.WARNING if found.mostly_float else logging.INFO, found.summary())
        return found

    def deviations(self, report: QuantizeReport) -> None:
        """Warns of everything that differs from the request, in a line for layers alike, once over all attempts."""
        for line in report.deviation_lines():
            self.warn(line)

    def warn(self, line: str) -> None:
        """Warns of something, once in a run and on one rank."""
        if distributed.rank() == 0 and line not in self._warnings:
            warn(log, line)
        self._warnings.add(line)

    def end(self, report: QuantizeReport, folder: Path | None) -> None:
        """Shows the layers and the result; the next run logs everything anew. The model is quantized and exported by
        then: an error here is logged, not raised, since it would tell that nothing had been done.

        Args:
            report: Of the accepted result.
            folder: Its export; None without one.
        """
        self._floats, self._warnings = None, set()
        if distributed.rank() == 0:
            try:
                show(log, f"layers:\n{layers_shown(report)}\n{ending(report, folder)}")
            except Exception:
                log.exception("the model is quantized; its report could not be shown")

    def exported(self, report: QuantizeReport | None, folder: Path) -> None:
        """Shows an export that is no run's end."""
        if report is not None:
            show(log, exported(report, folder))
