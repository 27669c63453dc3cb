"""The report, its page and the model card of a converted checkpoint: `convert_report`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.export.export_size import export_size
from gptq_plugin.export.side_files import CARD, PAGE, REPORT, export_card, write_report
from gptq_plugin.options.limited_files import read_text
from gptq_plugin.report.merged_text import merged
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.report.stored_report import read_report

log = logging.getLogger(__name__)

_MOST_LINES = 2000  # of a card; a usual one has a hundred


def convert_report(source: Checkpoint, staging: Path, checkpoint_format: str, description: Mapping[str, Any]) -> None:
    """Writes the report, page and card of our checkpoints anew for another format. What a person changed in the card
    stays; a warning names lines that this keeps out. Files of other tools stay as they are, with a warning.

    Args:
        source: The checkpoint.
        staging: The converted folder, with its weights and a copy of the source's other files.
        checkpoint_format: Its format.
        description: Its ``quantization_config``.
    """
    card = _text(staging / CARD)
    try:
        before, facts = read_report(_text(staging / REPORT))
        _refuse_long(card, before)
    except ValueError:
        stale = [name for name in (CARD, PAGE, REPORT) if (staging / name).exists()]
        if stale:
            log.warning(
                "%s: copied as they are; they tell of the checkpoint in %s, not of checkpoint_format=%s. Correct them "
                "by hand before you publish the folder",
                ", ".join(stale),
                source.checkpoint_format,
                checkpoint_format,
            )
        return
    after = _converted(before, staging, checkpoint_format, source)
    settings = FORMATS[checkpoint_format].settings(description, after.config)
    text = export_card(after, facts, settings)
    as_written = export_card(before, facts, source.format.settings(source.quantization, before.config))
    text, lost = merged(as_written, card or as_written, text)
    if lost:
        log.warning(
            "%s: lines that were changed by hand are kept; for checkpoint_format=%s they would be:\n%s",
            CARD,
            checkpoint_format,
            "\n".join(lost),
        )
    write_report(staging, after, facts, settings, text)


def _refuse_long(card: str, report: QuantizeReport) -> None:
    """Refuses what no card and report of ours are: comparing lines takes time with the square of their number.

    Raises:
        ValueError: It is longer.
    """
    rows = len(report.metrics) + len(report.spreads) + len(report.benchmarks) + len(report.deviations)
    if card.count("\n") > _MOST_LINES or rows > _MOST_LINES:
        raise ValueError("longer than any that is written")


def _converted(report: QuantizeReport, folder: Path, checkpoint_format: str, source: Checkpoint) -> QuantizeReport:
    """The report with the sizes of another format."""
    config = dataclasses.replace(report.config, checkpoint_format=checkpoint_format)

    def resized(module: ModuleReport) -> ModuleReport:
        if module.bits is None or module.group_size is None:
            return module
        own = config.for_module(module.name) or config
        own = dataclasses.replace(own, bits=module.bits, group_size=module.group_size)
        return dataclasses.replace(module, stored_bytes=module.places * stored_bytes(module.shape, own))

    modules = [resized(module) for module in report.modules]
    after = dataclasses.replace(report, config=config, modules=modules, size=export_size(folder, set(source.layers)))
    if report.coverage is not None:
        packed = report.coverage.packed + after.stored_bytes - report.stored_bytes
        after.coverage = dataclasses.replace(report.coverage, packed=packed)
    return after


def _text(file: Path) -> str:
    """A file's content; empty if there is none, or it is no text, or too large for what it should be."""
    try:
        return read_text(file)
    except (OSError, ValueError):
        return ""
