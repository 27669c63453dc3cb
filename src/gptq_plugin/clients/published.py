"""`Published`: an export as its model card shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptq_plugin.report.model_card import ModelFacts
from gptq_plugin.report.report import QuantizeReport


@dataclass(frozen=True)
class Published:
    """What the section of a model card on a client is written from.

    Attributes:
        report: The quantization's.
        settings: How the layers are quantized, in `QuantizeConfig`'s terms (`Format.settings`).
        facts: The model's.
    """

    report: QuantizeReport
    settings: Mapping[str, Any]
    facts: ModelFacts

    @property
    def grids(self) -> set[tuple[int, int]]:
        """(bits, group_size) of the quantized layers."""
        layers = self.report.quantized
        found = {(m.bits, m.group_size) for m in layers if m.bits is not None and m.group_size is not None}
        return found or {(self.settings["bits"], self.settings["group_size"])}
