"""Quantizes a model until it is good enough, or gives it back as it was: `Attempts`. No Lightning."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gptq_plugin.calibration.collect import collect
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import problems
from gptq_plugin.errors import QualityError
from gptq_plugin.memory.shared_layers import SharedLayers
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.experts import unfused
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.one_pass import ModelForward, Progress
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.escalation import Step, output_noise, steps
from gptq_plugin.training.quality_gate import QualityGate

log = logging.getLogger(__name__)

_NOISE = 2  # calibration batches that show which layers are the noisiest


class _NotGoodEnough(Exception):
    """Makes an attempt give the float weights back.

    Attributes:
        noise: By layer, where the gate escalates and this was the first attempt; else None.
    """

    def __init__(self, failures: list[str], noise: Mapping[str, float] | None) -> None:
        super().__init__("; ".join(failures))
        self.noise = noise


@dataclass(frozen=True)
class Attempts:
    """How a model is quantized, and judged.

    In a process group every rank makes the same calls, and is to measure the same.

    Attributes:
        model: The float model.
        gate: What is good enough, and what to do otherwise.
        before: The float model's metrics; without any, nothing is measured and all is good.
        measure: Called on the quantized model: its metrics.
        data: Called for every attempt: the calibration data.
        finish: Called with the quantizer and the report of the result that is taken, while the model is quantized.
        forward, tokenizer, progress, keep, device, device_memory: As for `QuantizeModule.temporarily`.
        layers_in: Called for every attempt: its `layers_in`.
        target: Who is to load the export; what it would not take is not tried.
    """

    model: nn.Module
    gate: QualityGate
    before: Mapping[str, float]
    measure: Callable[[], Mapping[str, float]]
    data: Callable[[], Iterable[Any]]
    finish: Callable[[QuantizeModule, QuantizeReport], None]
    forward: ModelForward
    tokenizer: Any = None
    progress: Progress | None = None
    keep: bool = False
    device: torch.device | None = None
    device_memory: int | None = None
    layers_in: Callable[[], SharedLayers] | None = None
    target: Client | None = None

    def quantize(self, quantizer: QuantizeModule) -> QuantizeReport:
        """The first result that is good enough. Its report says what was tried before it.

        Raises:
            QualityError: None is; the model has its float weights.
        """
        with unfused(self.model):
            return self._quantize(quantizer)

    def _quantize(self, quantizer: QuantizeModule) -> QuantizeReport:
        floats = {target.name: target.module for target in quantizer.check(self.model)[0]}
        attempt = quantizer
        tried: list[str] = []
        left: Iterator[Step] = iter(())
        while True:
            try:
                return self._attempt(attempt, floats, tried)
            except _NotGoodEnough as failure:
                if failure.noise is not None:
                    left = steps(self.model, quantizer.config, failure.noise)
                step = next((step for step in left if self._may_be_tried(step)), None)
                if step is None:
                    raise QualityError(
                        f"the quantized model is not good enough: {failure}; {self._advice(len(tried))}. Nothing was "
                        "exported, and the module has its float weights"
                    ) from None
                tried.append(f"escalated, {step.what}: before, {failure}")
                log.warning("%s", tried[-1])
                attempt = copy.copy(quantizer)
                attempt.config = step.config

    def _attempt(self, quantizer: QuantizeModule, floats: Mapping[str, nn.Module], tried: list[str]) -> QuantizeReport:
        with quantizer.temporarily(
            self.model,
            self.data(),
            forward=self.forward,
            tokenizer=self.tokenizer,
            progress=self.progress,
            keep=self.keep,
            device=self.device,
            device_memory=self.device_memory,
            layers_in=None if self.layers_in is None else self.layers_in(),
        ) as report:
            report.deviations += tried
            with streamed_to(self.model, self.device):
                after = self.measure() if self.before else {}
            report.metrics = {n: {"float": self.before[n], "gptq": after[n]} for n in self.before if n in after}
            failures = self.gate.failures(self.before, after)
            if failures and self.gate.on_fail == "warn":
                report.deviations += failures
                for failure in failures:
                    log.warning("not good enough, and taken as on_fail='warn' asks: %s", failure)
            elif failures:
                first = self.gate.on_fail == "escalate" and not tried
                raise _NotGoodEnough(failures, self._noise(quantizer, report, floats) if first else None)
            self.finish(quantizer, report)
            return report

    def _may_be_tried(self, step: Step) -> bool:
        if not self.gate.affords(step.bits):
            return False
        return self.target is None or not problems(Inventory.of_model(self.model, step.config), self.target)

    def _noise(
        self, quantizer: QuantizeModule, report: QuantizeReport, floats: Mapping[str, nn.Module]
    ) -> dict[str, float]:
        batches = collect(self.data(), quantizer.config, self.tokenizer).batches[:_NOISE]
        wanted = {module.name: floats[module.name] for module in report.quantized}
        runs = [partial(self.forward, self.model, batch.data) for batch in batches]
        with streamed_to(self.model, self.device), streamed_to(nn.ModuleList(wanted.values()), self.device):
            return output_noise(self.model, wanted, runs)

    def _advice(self, tried: int) -> str:
        if self.gate.on_fail == "raise":
            return "try more bits, a smaller group_size, or on_fail='escalate'"
        limit = "" if self.gate.max_bits is None else f" within max_bits={self.gate.max_bits:g}"
        limit += "" if self.target is None else f" that {self.target} takes"
        return f"nor is any of the {tried} others tried{limit}" if tried else f"there is nothing else to try{limit}"
