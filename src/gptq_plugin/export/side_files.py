"""Writes the files beside the weights: quantize_config.json, the report, its page and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_plugin.checkpoint.files import QUANTIZE_CONFIG, write_json
from gptq_plugin.clients.loading import loading_sections
from gptq_plugin.clients.published import Published
from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.export.export_dir import files_in
from gptq_plugin.report.html_page import report_page
from gptq_plugin.report.model_card import ModelFacts, heading, model_card
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.report.stored_report import report_text

REPORT = "quantization_report.json"
PAGE = "report.html"
CARD = "README.md"


def write_quantize_config(staging: Path, description: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Writes AutoGPTQ's file: the description, everything needed to quantize in the same way again, and a list of our
    files, by which a later export knows what it may replace. It is therefore written last.

    Args:
        staging: The export's folder.
        description: The ``quantization_config`` of config.json.
        settings: As `QuantizeConfig.to_quantize_config` gives them.
    """
    meta = {**settings["meta"], **description["meta"]}
    listed = sorted([*files_in(staging), QUANTIZE_CONFIG])
    ours = [part.get(QUANTIZER_NAME) or {} for part in (settings["meta"], description["meta"])]
    meta[QUANTIZER_NAME] = {**ours[0], **ours[1], "files": listed}
    write_json(staging / QUANTIZE_CONFIG, {**settings, **description, "meta": meta})


def export_card(report: QuantizeReport, facts: ModelFacts, settings: Mapping[str, Any]) -> str:
    """The text of the model card, with a section for each client. Arguments as for `write_report`."""
    return model_card(report, settings, facts, loading_sections(Published(report, settings, facts)))


def write_report(
    staging: Path, report: QuantizeReport, facts: ModelFacts, settings: Mapping[str, Any], card: str | None = None
) -> None:
    """Writes the report for programs, for people and for the hub. The card replaces a README.md of the tokenizer.

    Args:
        staging: The export's folder.
        report: Without paths of this machine.
        facts: Of the model.
        settings: How it is quantized, in `QuantizeConfig`'s terms (`Format.settings`).
        card: The card's text, by default that of `export_card`.
    """
    (staging / REPORT).write_text(report_text(report, facts), encoding="utf-8")
    (staging / PAGE).write_text(report_page(report, heading(report, facts)), encoding="utf-8")
    (staging / CARD).unlink(missing_ok=True)  # never through a link
    (staging / CARD).write_text(card or export_card(report, facts, settings), encoding="utf-8")
