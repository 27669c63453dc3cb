"""The export that QuantizeModule writes while layers are still being solved.

Tested by tests/quantize/test_module.py: a whole quantization with `export_dir`.
"""

from __future__ import annotations

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
from gptq_plugin.model.plan import Plan
from gptq_plugin.options import fields
from gptq_plugin.report.report import QuantizeReport


def check(export_dir: str | Path | None, overwrite: bool) -> None:
    """Refuses a folder that could not be written, and one under several ranks; None is no export."""
    fields.SWITCH.check("overwrite", overwrite)
    fields.optional(fields.PATH, "nothing is exported").check("export_dir", export_dir)
    if export_dir is None:
        return
    if distributed.active():
        raise ValueError("export_dir is for one process; under DDP call export on rank 0 afterwards")
    check_export_dir(export_dir, overwrite)


def begun(plan: Plan, directory: str | Path, overwrite: bool, client: Client | None) -> Export:
    """Returns the export that takes finished layers, if there is room for it."""
    refuse_without_room(plan, directory)
    return Export(plan.structure, directory, plan.config, overwrite=overwrite, target=client)


def finish(export: Export, model: nn.Module, report: QuantizeReport, tokenizer: Any, sample: Sample | None) -> None:
    """Writes the rest of the export beside its place, and notes the time in the report."""
    started = time.perf_counter()
    export.finish(model, report=report, tokenizer=tokenizer, sample=sample)
    report.seconds["export"] = time.perf_counter() - started
