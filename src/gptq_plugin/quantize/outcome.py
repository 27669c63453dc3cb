"""The outcome of one pass, from solved layers to the report: `Outcome`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.checkpoint.sizes import target_bytes
from gptq_plugin.device.streams import AsyncRead, Stopwatch
from gptq_plugin.gptq.grid import COARSE_SCALE, coarse_scales
from gptq_plugin.gptq.solve_each import Solutions
from gptq_plugin.gptq.solver import Solution
from gptq_plugin.model.experts import experts_of
from gptq_plugin.model.linears import linear_shape
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Skipped, Target
from gptq_plugin.quantize.data_checks import Samples, unreached
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.walk.expert_hessians import Evidence
from gptq_plugin.walk.lockstep import Notes
from gptq_plugin.walk.ranges import near_float16

Key = TypeVar("Key", bound=Hashable)


class Observed(Protocol):
    """What the report tells of the inputs that layers were solved with, such as an `Evidence`."""

    @property
    def tokens(self) -> int: ...

    @property
    def deviations(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Solved:
    """A solved layer. Its values may still be on their way from the device, so nothing is read during the walk.

    Attributes:
        target: The layer.
        losses: [4, layers], losses of the layers solved together, those of round-to-nearest, the power of the
            float layers' outputs, and the number of coarse scales, summed over rows.
        number: The layer's column.
        share: The layer's share of the time.
        stopwatch: Measures the time of all.
        method, damp_percent, tokens, deviations: As in the report.
    """

    target: Target
    losses: AsyncRead
    number: int
    share: float
    stopwatch: Stopwatch
    method: str
    damp_percent: float
    tokens: int
    deviations: tuple[str, ...]

    def report(self, remarks: tuple[str, ...], max_input: float, max_output: float) -> ModuleReport:
        """The layer's line in the report. Waits for the device."""
        loss, rtn_loss, power, coarse = (of_all[self.number] for of_all in self.losses.get())
        near = near_float16(max_input, max_output)
        return module_report(
            self.target,
            method=self.method,
            loss=loss,
            rtn_loss=rtn_loss,
            output_power=power,
            tokens=self.tokens,
            damp_percent=self.damp_percent,
            seconds=self.stopwatch.seconds() * self.share,
            max_input=max_input,
            max_output=max_output,
            deviations=(*self.deviations, *remarks, *([] if near is None else [near]), *coarse_scales(int(coarse))),
        )


class Outcome:
    """The layers solved so far, and what deviated.

    Args:
        plan: The layers.

    Attributes:
        solved: By name.
        notes: For the walk.
        left_float: Why targets stay float after all, by name; none is given for those that calibration never called.
    """

    def __init__(self, plan: Plan) -> None:
        self.solved: dict[str, Solved] = {}
        self.notes = Notes()
        self.left_float: dict[str, str] = {}
        self._plan = plan
        self._returned: dict[str, int] = defaultdict(int)
        self._stopwatches: list[Stopwatch] = []

    def add(self, targets: Sequence[Target], solution: Solution, observed: Observed, stopwatch: Stopwatch) -> None:
        """Takes the solution of layers that were solved together, their rows one below the other."""
        rows = [target.shape[0] for target in targets]
        coarse = (solution.weight.scales < COARSE_SCALE).sum(0).to(solution.loss)
        values = (solution.loss, solution.rtn_loss, solution.output_power, coarse)
        sums = [torch.stack([part.sum() for part in value.split(rows)]) for value in values]
        losses = AsyncRead(torch.stack(sums))
        for number, (target, count) in enumerate(zip(targets, rows, strict=True)):
            self.solved[target.name] = Solved(
                target,
                losses,
                number,
                share=count / sum(rows),
                stopwatch=stopwatch,
                method=solution.method,
                damp_percent=solution.damp_percent,
                tokens=observed.tokens,
                deviations=solution.deviations + observed.deviations,
            )
        self._stopwatches.append(stopwatch)

    def add_experts(
        self,
        experts: Sequence[Sequence[Target]],
        solved: Solutions,
        evidence: Sequence[Evidence],
        good: Sequence[bool],
        stopwatch: Stopwatch,
        share: float,
    ) -> None:
        """Takes the solutions of experts that were solved together, those that are good.

        Args:
            experts: The layers of each, alike for all; their rows are one below the other.
            solved: Their solutions.
            evidence: For each expert.
            good: For each expert.
            stopwatch: Measures the time of these and others.
            share: An expert's, of that time.
        """
        rows = [target.shape[0] for target in experts[0]]
        coarse = (solved.scales < COARSE_SCALE).sum(1, keepdim=True).to(solved.losses)
        parts = torch.cat([solved.losses, coarse], 1).split(rows, -1)
        losses = AsyncRead(torch.stack([part.sum(-1) for part in parts], -1).movedim(1, 0).flatten(1))
        for expert, layers in enumerate(experts):
            for part, target in enumerate(layers if good[expert] else ()):
                self.solved[target.name] = Solved(
                    target,
                    losses,
                    expert * len(layers) + part,
                    share=rows[part] / sum(rows) * share,
                    stopwatch=stopwatch,
                    method="gptq",
                    damp_percent=max(evidence[expert].damp_percent, target.config.damp_percent),
                    tokens=evidence[expert].tokens,
                    deviations=evidence[expert].deviations,
                )
        if stopwatch not in self._stopwatches:
            self._stopwatches.append(stopwatch)

    def add_late(self, layer: str, calls: int) -> None:
        """Counts calls of a layer that came after it was solved."""
        self._returned[layer] += calls

    def late(self) -> dict[str, int]:
        """By layer, the calls on all ranks that came after it was solved. Collective."""
        return sum_over_ranks({**self.notes.late, **self._returned})

    def solving_seconds(self) -> float:
        """Time of all solutions. Waits for the device."""
        return sum(stopwatch.seconds() for stopwatch in self._stopwatches)

    def modules(
        self, ranges: Mapping[str, tuple[float, float]], remarks: Mapping[str, tuple[str, ...]]
    ) -> list[ModuleReport]:
        """The report's lines of all targets, in their order.

        Args:
            ranges: Largest input and output, by layer.
            remarks: Sentences on inputs, of the layers that have any.
        """
        return [
            self._module(target, remarks.get(target.name, ()), *ranges[target.name]) for target in self._plan.targets
        ]

    def report(
        self,
        modules: Sequence[ModuleReport],
        samples: Samples,
        calibration: Calibration,
        seconds: dict[str, float],
        deviations: Iterable[str],
        late: Mapping[str, int],
    ) -> QuantizeReport:
        """The report of all ranks' pass. All ranks call it.

        Args:
            modules: As `modules` gives them.
            samples: Of all ranks.
            calibration: This rank's.
            seconds: By phase.
            deviations: Of data and memory, the same on every rank.
            late: As `late` gives them.
        """
        found: dict[str, None] = {}
        of_all = distributed.gather_objects((calibration.deviations, calibration.most_samples))
        for one, _ in of_all:
            found.update(dict.fromkeys(one))
        sources = sum_over_ranks(calibration.sources)
        return QuantizeReport(
            self._plan.config,
            [*modules, *float_reports(self._plan.skipped)],
            samples=samples.count,
            tokens=max(module.tokens for module in modules),
            seconds=seconds,
            deviations=[*found, *deviations, *_late(late), *self._damped()],
            calibration="; ".join(f"{count} samples of {source}" for source, count in sources.items()),
            calibration_sha256=samples.sha256,
            run_id=samples.run_id,
            batch_size=max(size for _, size in of_all),
        )

    def check_reached(self) -> None:
        """Refuses a pass that solved nothing.

        Raises:
            CalibrationError: No batch reached any layer.
        """
        if not self.solved:
            raise unreached(self._plan)

    def _module(self, target: Target, remarks: tuple[str, ...], max_input: float, max_output: float) -> ModuleReport:
        if target.name in self.solved:
            return self.solved[target.name].report(remarks, max_input, max_output)
        reason = f"{self.left_float.get(target.name, 'never called in calibration')}: left float"
        return module_report(target, method="float", reason=reason, deviations=(reason,))

    def _damped(self) -> list[str]:
        few = [
            one.damp_percent
            for one in self.solved.values()
            if one.damp_percent > one.target.config.damp_percent
            if experts_of(one.target.name, one.target.module) is not None
        ]
        if not few:
            return []
        return [
            f"{len(few)} layers of experts are damped more than damp_percent asks, up to {max(few):.2g}, for the few "
            "tokens that were routed to them"
        ]


def _late(calls: Mapping[str, int]) -> list[str]:
    return [
        f"{name}: {count} calls came after it was quantized; their inputs are not in its Hessian"
        for name, count in calls.items()
        if count
    ]


def sum_over_ranks(counts: Mapping[Key, int]) -> dict[Key, int]:
    """The ranks' counts added up by key; all ranks call it."""
    sums: dict[Key, int] = defaultdict(int)
    for one in distributed.gather_objects(dict(counts)):
        for name, count in one.items():
            sums[name] += count
    return dict(sums)


def module_report(target: Target, method: str, **values: Any) -> ModuleReport:
    """The report's line of a target, quantized or left float after all."""
    is_float = method == "float"
    values["deviations"] = (*(() if is_float else target.deviations), *values.get("deviations", ()))
    return ModuleReport(
        name=target.name,
        method=method,
        bits=None if is_float else target.config.bits,
        group_size=None if is_float else target.config.group_size,
        shape=target.shape,
        places=target.places,
        stored_bytes=0 if is_float else target_bytes(target),
        **values,
    )


def rounded_report(plan: Plan) -> QuantizeReport:
    """The report of a plan whose layers are rounded to nearest."""
    modules = [module_report(target, method="rtn") for target in plan.targets]
    return QuantizeReport(plan.config, [*modules, *float_reports(plan.skipped)])


def float_reports(skipped: Iterable[Skipped]) -> list[ModuleReport]:
    """The report's lines of layers that stay float as planned."""
    return [
        ModuleReport(
            skip.name,
            "float",
            None,
            None,
            linear_shape(skip.module),
            reason=skip.reason,
            deviations=() if skip.asked else (skip.reason,),
        )
        for skip in skipped
    ]
