"""The export that QuantizeModule writes while layers are still being solved.

Tested by tests/quantize/test_module.py: a whole quantization with `export_dir`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from torch import nn

from gptq_plugin import distributed
from gptq_plugin.clients.client import Client
from gptq_plugin.export.export import Export
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.export.planned_room import refuse_without_room
from gptq_plugin.export.verify_outputs import Sample
from gptq_plugin.model.as_configured import refuse_other_than_configured
from gptq_plugin.model.plan import Plan
from gptq_plugin.options import fields
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.report.report import QuantizeReport


def check(model: nn.Module, export_dir: str | Path | None, overwrite: bool) -> None:
    """Refuses a folder that could not be written, one under several ranks, and a model that no loader could make; None
    is no export."""
    fields.SWITCH.check("overwrite", overwrite)
    fields.optional(fields.PATH, "nothing is exported").check("export_dir", export_dir)
    if export_dir is None:
        return
    if distributed.active():
        raise ValueError("export_dir is for one process; under DDP call export on rank 0 afterwards")
    check_export_dir(export_dir, overwrite)
    refuse_other_than_configured(model)


class Begun:
    """Begins the export that takes the finished layers of a pass; a pass that begins again has another.

    Args:
        plan: The layers.
        directory: The folder; None is no export.
        overwrite, client: As for `Export`, its `target`.
        options: Of the pass.

    Attributes:
        export: The last one; None without any.
    """

    def __init__(
        self, plan: Plan, directory: str | Path | None, overwrite: bool, client: Client | None, options: PassOptions
    ) -> None:
        self.export: Export | None = None
        self._plan, self._directory, self._overwrite, self._client = plan, directory, overwrite, client
        self._options = options

    def __call__(self, around: contextlib.ExitStack) -> PassOptions:
        """Returns the options of a pass whose export is removed at the end of a context, unless it is placed before.

        Raises:
            ExportError: There is no room for it, or its folder cannot be used.
        """
        if self._directory is None:
            return self._options
        refuse_without_room(self._plan, self._directory)
        export = Export(
            self._plan.structure, self._directory, self._plan.config, overwrite=self._overwrite, target=self._client
        )
        self.export = around.enter_context(export)
        export.check(one.name for one in self._plan.targets)
        return dataclasses.replace(self._options, layers_in=export)


def finish(export: Export, model: nn.Module, report: QuantizeReport, tokenizer: Any, sample: Sample | None) -> None:
    """Writes the rest of the export beside its place, and notes the time in the report."""
    started = time.perf_counter()
    export.finish(model, report=report, tokenizer=tokenizer, sample=sample)
    report.seconds["export"] = time.perf_counter() - started
