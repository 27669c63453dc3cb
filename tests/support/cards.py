"""Model cards of reports made by hand, and their parts."""

from __future__ import annotations

import re
from typing import Any

import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.clients.loading import Published, loading_sections
from gptq_plugin.report.model_card import ModelFacts, model_card
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.report import QuantizeReport

TASKLESS = ModelFacts("LlamaForCausalLM", "AutoModelForCausalLM", torch.float16)
SETTINGS = {
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "lm_head": False,
    "checkpoint_format": "gptq",
}


def card_of(report: QuantizeReport, facts: ModelFacts = TASKLESS, **changed: Any) -> str:
    """The card of symmetric 4 bits in groups of 128; `changed` are other settings."""
    settings = {**SETTINGS, **changed}
    return model_card(report, settings, facts, loading_sections(Published(report, settings, facts)))


def report_of(*widths: tuple[int, int], **other: Any) -> QuantizeReport:
    """A report of one layer for each (bits, group_size)."""
    layers = [ModuleReport(f"layers.{i}", "gptq", b, g, (20, 128), 0.1, 0.2) for i, (b, g) in enumerate(widths)]
    return QuantizeReport(QuantizeConfig(), layers, **other)


def section(card: str, title: str) -> str:
    """The text below a heading."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", card, flags=re.M | re.S)
    assert found, f"no section {title}"
    return found[1].strip()


def snippet(card: str, title: str) -> str:
    """The code below a heading."""
    return re.search(r"```\w+\n(.*?)```", section(card, title), flags=re.S)[1].strip()
