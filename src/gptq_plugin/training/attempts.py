"""`Attempts`: quantizes a model until it is good enough, or leaves it float."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.forward import takes_of
from gptq_plugin.clients.client import Client
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.clients.rules import problems
from gptq_plugin.errors import CalibrationError, QualityError, RankError, TargetError
from gptq_plugin.memory.shared_layers import SharedLayers
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize import arguments
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.sensitivity import measure_model
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.training.escalation import Ranking, Step, budget_steps, steps
from gptq_plugin.training.finish_run import FinishRun
from gptq_plugin.training.output_noise import output_noise
from gptq_plugin.training.paired import spread
from gptq_plugin.training.quality_gate import QualityGate

log = logging.getLogger(__name__)

_NOISE_BATCHES = 2  # enough to rank layers by noise, where they cannot be measured otherwise

Accept = Callable[[QuantizeModule, QuantizeReport], None]


@dataclass(frozen=True)
class Quality:
    """How quality is measured, and how good it has to be. By default nothing is measured and every result is taken.

    Attributes:
        gate: Limits, and what to do when one does not hold.
        before: Metrics of the float model, those that are means as `Measured`. If empty, the quantized model is not
            measured.
        measure: Called without arguments while the model is quantized; returns its metrics, the same way.
    """

    gate: QualityGate = field(default_factory=lambda: QualityGate({}))
    before: Mapping[str, float] = field(default_factory=dict)
    measure: Callable[[], Mapping[str, float]] = dict


class _NotGoodEnough(Exception):
    """Ends an attempt, so that the model gets its float weights back.

    Attributes:
        first: After the first attempt of an escalation, what to try next; else None.
    """

    def __init__(self, failures: list[str], first: Iterator[Step] | None) -> None:
        super().__init__("; ".join(failures))
        self.first = first


@dataclass(frozen=True)
class Attempts:
    """How a model is quantized and judged.

    In a process group every rank makes the same calls, and has to measure the same metrics.

    Attributes:
        model: The float model.
        data: Called once per attempt; returns the calibration data.
        quality: The quality an attempt has to reach.
        options: Options of each attempt's pass; `forward` runs the batches that noise is measured on, too.
        keep: As for `QuantizeModule.temporarily`.
        layers_in: Called once per attempt; returns the option of that name.
        target: Client of the export; configurations it would refuse are not tried.
        finish: What trains each attempt's result; None leaves it as GPTQ gives it.
    """

    model: nn.Module
    data: Callable[[], Iterable[Any]]
    options: PassOptions
    quality: Quality = field(default_factory=Quality)
    keep: bool = False
    layers_in: Callable[[], SharedLayers] | None = None
    target: Client | None = None
    finish: FinishRun | None = None

    def quantize(self, quantizer: QuantizeModule, accept: Accept) -> QuantizeReport:
        """Quantizes until the result is good enough, and reports what was tried before it.

        Args:
            quantizer: The first configuration to try.
            accept: Called with the quantizer and the report of the accepted result, while the model is quantized. With
                a `finish` it is called with GPTQ's result, if that is good enough, and again behind the finish.

        Raises:
            QualityError: No attempt is good enough; the model has its float weights.
        """
        attempt = quantizer
        tried: list[str] = []
        untried: Iterator[Step] = iter(())
        while True:
            try:
                return self._attempt(attempt, tried, accept)
            except _NotGoodEnough as failure:
                if failure.first is not None:
                    untried = failure.first
                step = next((step for step in untried if self._is_allowed(step)), None)
                if step is None:
                    raise QualityError(
                        f"the quantized model is not good enough: {failure}; {self._advice(len(tried))}. Nothing was "
                        "exported, and the module has its float weights"
                    ) from None
                tried.append(f"escalated, {step.what}: before, {failure}")
                _warn("%s", tried[-1])
                attempt = copy.copy(quantizer)
                attempt.config = step.config

    def _attempt(self, quantizer: QuantizeModule, tried: list[str], accept: Accept) -> QuantizeReport:
        options = self.options if self.layers_in is None else replace(self.options, layers_in=self.layers_in())
        with quantizer.temporarily(self.model, self.data(), options, keep=self.keep) as report:
            report.deviations += tried
            gate = self.quality.gate
            measured = self._measure(report)
            failures = gate.failures(self.quality.before, measured)
            if self.finish is not None:
                failures = self._finished(self.finish, quantizer, report, accept, measured)
            if failures and gate.on_fail == "warn":
                report.deviations += failures
                for failure in failures:
                    _warn("not good enough, and accepted because of on_fail='warn': %s", failure)
            elif failures:
                is_first = gate.on_fail == "escalate" and not tried
                raise _NotGoodEnough(failures, self._steps(quantizer, report) if is_first else None)
            accept(quantizer, report)
            return report

    def _finished(
        self,
        finish: FinishRun,
        quantizer: QuantizeModule,
        report: QuantizeReport,
        accept: Accept,
        first: Mapping[str, float],
    ) -> list[str]:
        """Finishes the quantized model, which has the metrics `first`; returns the limits that do not hold then. A
        finish is undone that leads beyond a limit, or further beyond one."""
        gate, before = self.quality.gate, self.quality.before
        failures = gate.failures(before, first)
        is_good = not failures or gate.on_fail == "warn"
        if is_good:  # what happens to the finish leaves this export
            report.deviations += failures
            accept(quantizer, report)
            report.deviations = [one for one in report.deviations if one not in failures]
        metrics, spreads = report.metrics, report.spreads
        if not finish.run(quantizer, self.model, self.options, exported=is_good):
            return failures
        last = self._measure(report)
        after = gate.failures(before, last)
        if gate.is_worse(before, first, last):
            why = "is nearer to the limits" if failures else "keeps within the limits"
            quantizer.undo_finish(f"{'; '.join(after)}: undone, since GPTQ's result {why}")
            report.metrics, report.spreads = metrics, spreads
            return failures
        return after

    def _measure(self, report: QuantizeReport) -> Mapping[str, float]:
        """Measures the quantized model and notes the metrics in the report."""
        before = self.quality.before
        with streamed_to(self.model, self.options.where):
            after = self.quality.measure() if before else {}
        both = [name for name in before if name in after]
        report.metrics = {name: {"float": float(before[name]), "gptq": float(after[name])} for name in both}
        spreads = {name: spread(before[name], after[name]) for name in both}
        report.spreads = {name: found for name, found in spreads.items() if found is not None}
        return after

    def _is_allowed(self, step: Step) -> bool:
        if not self.quality.gate.affords(step.bits):
            return False
        return self.target is None or not problems(Inventory.of_plan(step.plan), self.target)

    def _steps(self, quantizer: QuantizeModule, report: QuantizeReport) -> Iterator[Step]:
        """What to try after this attempt, as far as that has to be measured before its end."""
        allocated = quantizer.allocated
        assert allocated is not None  # the model is quantized
        if allocated.budget is not None:
            return budget_steps(allocated)
        noise = self._noise(quantizer, allocated.plan, report)
        return steps(allocated.plan, noise, lambda: self._ranking(quantizer, noise))

    def _ranking(self, quantizer: QuantizeModule, noise: Mapping[str, float]) -> Ranking:
        """Measured on tokens that the layers are not calibrated on; else their noise on those that they are."""
        own = {name: getattr(quantizer, name) for name in arguments.OPTIONS}
        try:
            options = replace(self.options, **own)
            with distributed.failing_together():
                return Ranking(measure_model(self.model, self.data(), quantizer.config, options))
        except (CalibrationError, TargetError, RankError) as error:
            return Ranking(noise, f"; by their outputs' errors on calibration tokens: {error}")

    def _noise(self, quantizer: QuantizeModule, plan: Plan, report: QuantizeReport) -> Mapping[str, float]:
        options = self.options
        takes = takes_of(self.model, options.forward)
        data = collect(self.data(), quantizer.config, options.tokenizer, takes=takes)
        batches = [b for b, number in zip(data.batches, data.numbers, strict=True) if number < _NOISE_BATCHES]
        quantized = {module.name for module in report.quantized}
        floats = {target.name: target.module for target in plan.targets if target.name in quantized}
        run, where = options.runner(every_logit=False), options.where
        runs = [partial(run, self.model, batch.data) for batch in batches]
        with streamed_to(self.model, where), streamed_to(nn.ModuleList(floats.values()), where):
            return output_noise(self.model, floats, runs)

    def _advice(self, tried: int) -> str:
        gate = self.quality.gate
        if gate.on_fail == "raise":
            return "try more bits, a smaller group_size, or on_fail='escalate'"
        limit = "" if gate.max_bits is None else f" within max_bits={gate.max_bits:g}"
        limit += "" if self.target is None else f" that {self.target} takes"
        if not tried:
            return f"there is nothing else to try{limit}"
        return f"nor is {'the other one' if tried == 1 else f'any of the {tried} others'} tried{limit}"


def _warn(message: str, text: str) -> None:
    """Warns on rank 0: all ranks measure the same, and make the same attempts."""
    if distributed.rank() == 0:
        log.warning(message, text)
