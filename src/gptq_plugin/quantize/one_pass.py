"""One pass of the batches through the model, in which each layer is quantized when they wait at it: `OnePass`.

The model's modules and parameters stay as they are: while the batches walk, modules point to other tensors
(`memory.weights`), and the finished layers are kept apart. So a failure anywhere leaves the float model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Generator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.calibration.verdicts import departs, most_seen
from gptq_plugin.device.memory import trim, with_room
from gptq_plugin.device.streams import Stopwatch
from gptq_plugin.errors import TargetError
from gptq_plugin.gptq.solver import Solution
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory.finished_layers import FinishedLayers
from gptq_plugin.model.experts import experts_of
from gptq_plugin.model.experts_at_once import (
    call_others_apart,
    called,
    called_at_once,
    in_grouped_products,
    two_called,
)
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.data_checks import (
    Samples,
    check_enough,
    check_weight,
    count_samples,
    not_finite_on_ranks,
)
from gptq_plugin.quantize.evidence import Observations
from gptq_plugin.quantize.experts_pass import ExpertsPass
from gptq_plugin.quantize.first_forward import refuse_late
from gptq_plugin.quantize.gradient_weights import GradientWeights
from gptq_plugin.quantize.grouped_experts import solving_memory
from gptq_plugin.quantize.kept_pass import KeptPass, Stop, alike
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.outcome import Outcome, sum_over_ranks
from gptq_plugin.quantize.pass_identity import PassIdentity
from gptq_plugin.quantize.solve_on_ranks import solve_shared
from gptq_plugin.quantize.walk_record import WalkRecord
from gptq_plugin.report.report import QuantizeReport
from gptq_plugin.walk import lockstep
from gptq_plugin.walk.expert_hessians import Evidence
from gptq_plugin.walk.groups import Group
from gptq_plugin.walk.one_by_one import walk_one_by_one

log = logging.getLogger(__name__)


class OnePass:
    """Quantizes the layers of a plan. In a process group every rank makes its own pass, to the same layers.

    Args:
        plan: The layers.
        calibration: This rank's batches.
        options: How the pass runs.

    Attributes:
        runs: The batches' forwards.

    Raises:
        TargetError, ValueError: As `BatchRuns`.
    """

    def __init__(self, plan: Plan, calibration: Calibration, options: PassOptions) -> None:
        self._plan = plan
        self._calibration = calibration
        self._options = options
        self._targets = {target.name: target for target in plan.targets}
        self._of_experts: dict[str | None, list[Target]] = defaultdict(list)
        for target in plan.targets:
            self._of_experts[experts_of(target.name, target.module)].append(target)
        self._positions = Positions(plan.model, calibration.batches, plan.config.token_weighting)
        self.runs = BatchRuns(plan, calibration, self._positions, options, at_once=True)
        self._exact = options.sums_exactly(self.runs.device)
        seen = plan, self._positions, self.runs.device, lambda target: self.runs.weights.present(target)
        self._observations = Observations(*seen, self._exact, self.runs.at_once, self.runs.make_room)
        self._finished = FinishedLayers(plan.targets[0].parameter.device, options.layers_in)
        self._outcome = Outcome(plan)
        self._kept = KeptPass(options.kept(), self._targets, self.runs.device, self._exact)
        self._identity: PassIdentity | None = None  # None if nothing is to be kept
        own = plan, self.runs, self._observations, self._outcome, self._finished, self._kept, self._quantize_stop
        self._experts_pass = ExpertsPass(*own, solving_memory(self.runs.device, options))
        self._disturbance: str | None = None  # why the batches cannot take turns
        self._unchecked: list[str] = []  # why the quantized layers could not be compared in the model
        self._experts: str | None = None  # the block of experts that the walk is in

    def run(self) -> tuple[dict[str, QuantLinear], QuantizeReport]:
        """Returns the finished layers, on the model's device, and the report of all layers. To be called once.

        Raises:
            CalibrationError: The data is empty, too short, not finite, or reaches no layer.
            TargetError: A layer's weight is not finite.
        """
        started = time.perf_counter()
        with contextlib.closing(self._finished):
            samples = count_samples(self._calibration)
            if self._options.keeps:
                self._identity = PassIdentity(
                    self._plan, self._calibration, self._options, self.runs.device, self._exact
                )
            experts = self.runs.at_once.values()
            with in_grouped_products(experts), self.runs:
                with called_at_once(experts):
                    groups, modules = self._planned()
                    planned = time.perf_counter() - started
                    self._calibrate(groups, modules, samples)
                self._take_rest()
                self._outcome.check_reached()
                refuse_late(self._outcome.notes.late, self.runs.calibration, self._calibration)
                with two_called(self.runs.at_once) as others:
                    self._unchecked = self.runs.check_swap(sorted({*self._outcome.solved} - others))
                self._finished.take_home(wait=True)
        ranges = self._observations.ranges.over_ranks(self._targets, self.runs.device)
        record = self._kept.record or _recorded(ranges, self._observations, self._outcome, self._positions)
        self._kept.end(record)
        reports = self._outcome.modules(record.ranges, record.remarks)
        solving = self._outcome.solving_seconds()
        seconds = {"plan": planned, "calibrate": time.perf_counter() - started - planned - solving, "solve": solving}
        told = self._deviations(samples, record)
        report = self._outcome.report(reports, samples, self.runs.calibration, seconds, told, record.late)
        report.positions, report.cache = dict(record.positions), self._kept.totals()
        return self._finished.layers, report

    @property
    def key(self) -> str | None:
        """After `run`, a hash of all that it followed from and of all layers; None if nothing is kept."""
        return self._kept.key

    def _calibrate(self, groups: Sequence[Group], modules: Mapping[str, nn.Module], samples: Samples) -> None:
        with (
            self._positions.watching(self._observe_experts),
            self._observations.watching(modules),
            self.runs.replaceable.judging_first_calls(),
            contextlib.closing(self._walk(groups, modules)) as stops,
        ):
            for stop in stops:
                self._finished.take_home()
                self._quantize_group(stop, samples)
                trim(self.runs.device)
                if self._kept.record is not None:
                    break  # all that the walk would show is known
            self._leave_experts(None)

    def _planned(self) -> tuple[list[Group], dict[str, nn.Module]]:
        """The groups of layers, in the order of the walk, and by name what they are called by."""
        modules = {target.name: target.module for target in self._plan.targets}
        probing = contextlib.nullcontext() if self._identity is None else self._identity.probing(modules)
        with self._positions.watching():
            with probing:
                groups, left_float = self.runs.find_groups(modules)
            call_others_apart(groups, self.runs.at_once)
            self._outcome.left_float.update(left_float)
            for name in left_float:
                del modules[name]
            walked = called(groups, modules, self.runs.at_once)
            modules = {name: module for name, module in walked.items() if name in modules}
            self._disturbance = self.runs.disturbance(walked)
        found = self.runs.observe_positions(modules, self._disturbance, groups)
        self._positions.learn(most_seen(distributed.gather_objects(found)))
        weights = None
        if self._plan.config.token_weighting == "gradients":
            weights = self._weight_by_gradients(modules)
            groups = [dataclasses.replace(group, names=(name,)) for group in groups for name in group.names]
        groups = _without(left_float, groups)
        if self._identity is not None:
            self._identity.settle(groups, self._positions.findings, self._disturbance, self.runs.state, weights)
        return groups, walked

    def _weight_by_gradients(self, layers: Mapping[str, nn.Module]) -> GradientWeights:
        """Layers that read one input are weighted differently, so that each needs a Hessian of its own."""
        weights = GradientWeights.of(self._plan.model, layers)
        self.runs.measure(weights, range(len(self._calibration.batches)))
        weights.over_ranks()
        self._observations.weight_by(weights)
        return weights

    def _walk(self, groups: Sequence[Group], modules: Mapping[str, nn.Module]) -> Generator[lockstep.Stop, None, None]:
        walked = groups, modules, self.runs.forwards(), self._observe, distributed.minimum
        if self._disturbance is None:
            return lockstep.walk(*walked, self._outcome.notes, self.runs.waiting, self.runs.state, self.runs.walks)
        log.warning("%s", _alone(self._disturbance))
        return walk_one_by_one(*walked, self.runs.state, self.runs.walks)

    def _observe(self, group: Group, number: int, x: Tensor) -> None:
        batch = self.runs.walks.batch(number)
        if self.runs.walks.is_float(number):
            self._observations.observe_float(group, batch, x)  # what that keeps is one of the forward's activations
            return
        with self.runs.activations.untracked():
            if self._identity is not None and not self._outcome.solved:
                self._identity.see_first(batch, x)
            self._observations.observe(group, batch, x)

    def _observe_experts(self, experts: str, rows: Tensor) -> None:
        with self.runs.activations.untracked():
            if self._disturbance is None or self.runs.is_first_to_enter(experts):
                self._observations.observe_experts(experts, rows)

    def _quantize_group(self, stop: lockstep.Stop, samples: Samples) -> None:
        members = [self._targets[name] for name in stop.group.names if name not in self._outcome.solved]
        if not members:  # a batch came back to experts that the walk had left
            self._observations.discard(stop.group)
            late = [number for number in stop.inputs if not self.runs.walks.is_float(number)]
            self._outcome.add_late(stop.group.names[0], len(late))
            return
        self._leave_experts(experts_of(members[0].name, members[0].module))
        if stop.group.at_once:
            self._experts_pass.quantize(stop, samples)
            self._progress(members)
            return
        self._observations.count_other_calls(stop.group)
        shown = None
        if not self._outcome.solved:
            shown = self._observations.of_group(stop.group)
            check_enough(shown.tokens, samples.count, self._plan)
            if self._identity is not None:  # which the first layers' inputs complete
                self._kept.begin(*self._identity.key())
        kept = self._kept.stop(stop.group.names, lambda: self._observations.of_group(stop.group), shown=shown)
        self._quantize_stop(kept, members, stop)
        self._observations.known = {names for names, link in self._kept.ahead.items() if link.reached}

    def _quantize_stop(self, kept: Stop, members: list[Target], stop: lockstep.Stop) -> None:
        for same in alike(members):
            self._quantize(same, kept, stop)
        kept.end()

    def _take_rest(self) -> None:
        """Takes the layers of the stops to which the batches need not walk."""
        for names in list(self._kept.ahead) if self._kept.record is not None else ():
            members = [self._targets[name] for name in names if name not in self._outcome.solved]
            nowhere = lockstep.Stop(Group(names), {})
            self._quantize_stop(self._kept.stop(names, _not_walked), members, nowhere)

    def _leave_experts(self, entered: str | None) -> None:
        """Called when the walk leaves a block of experts. Quantizes experts no token reached: clients need all or
        none."""
        left, self._experts = self._experts, entered
        if left is None or left == entered:
            return
        for target in self._of_experts[left]:
            if target.name not in self._outcome.solved and target.name not in self._outcome.left_float:
                self._quantize_unreached(left, target)
        self._observations.leave(left)

    def _quantize_unreached(self, experts: str, target: Target) -> None:
        names = (target.name,)
        kept = self._kept.stop(names, lambda: self._observations.of_unreached(experts, target), reached=False)
        self._quantize_stop(kept, [target], lockstep.Stop(Group(names), {}))

    def _quantize(self, same: list[Target], kept: Stop, stop: lockstep.Stop) -> None:
        stopwatch = Stopwatch(self.runs.device)
        solved = kept.solve(same, lambda evidence: self._solve(same, evidence, stop))
        self._outcome.add(same, solved.solution, solved, stopwatch)
        start = 0
        for target in same:
            end = start + target.shape[0]
            rows = solved.solution.weight.rows(start, end)
            packed = partial(QuantLinear.from_quantized, rows, target.bias, target.parameter.dtype)
            layer = with_room(packed, self.runs.make_room)
            self.runs.weights.quantize([(target, layer, None)])
            self._finished.add(target.name, layer)
            start = end
        stopwatch.stop()
        self._progress(same)

    def _progress(self, targets: Sequence[Target]) -> None:
        if self._options.progress is not None:
            self._options.progress(len(self._outcome.solved), len(self._targets), _names(targets))

    def _solve(self, same: list[Target], evidence: Evidence, stop: lockstep.Stop) -> Solution:
        weights = [self.runs.weights.present(target) for target in same]
        config = same[0].config
        if evidence.damp_percent > config.damp_percent:
            config = dataclasses.replace(config, damp_percent=evidence.damp_percent)

        room = self.runs.make_room
        weight = weights[0] if len(weights) == 1 else with_room(lambda: torch.cat(weights), room)
        try:
            return solve_shared(
                weight, evidence.mean, config, drift=evidence.drift, in_blocks=self._exact, make_room=room
            )
        except ValueError as error:
            if not all(torch.isfinite(t).all() for t in (evidence.mean, evidence.drift) if t is not None):
                raise not_finite_on_ranks(self._plan.model, same[0].name, self.runs.not_finite(stop.inputs)) from error
            for target, weight in zip(same, weights, strict=True):
                check_weight(target.name, weight)
            raise TargetError(f"{_largest(same, weights)}: {error}") from error

    def _deviations(self, samples: Samples, record: WalkRecord) -> list[str]:
        """Deviations of memory and data, the same on every rank but for its device's memory."""
        wanted, notes = self._plan.config.nsamples, record.notes
        few = [f"{samples.count} calibration samples used, nsamples={wanted} asked"] if samples.count < wanted else []
        told = [f"{batches} calibration batches {note}" for note, batches in notes.items() if batches]
        alone = [_alone(self._disturbance)] if self._disturbance is not None else []
        masks = [f"{mask} {verdict}" for mask, verdict in record.positions.items() if departs(verdict)]
        replaced = self.runs.replaceable.replaced_forwards(self._outcome.left_float)
        over, kept = self.runs.over_budget(), self._kept.told()
        return [*over, *replaced, *self._unchecked, *few, *alone, *told, *masks, *kept]


def _recorded(
    ranges: Mapping[str, tuple[float, float]], observations: Observations, outcome: Outcome, positions: Positions
) -> WalkRecord:
    notes = sum_over_ranks(positions.notes())
    return WalkRecord(ranges, observations.remarks(), outcome.late(), notes, positions.over_ranks())


def _not_walked() -> Evidence:
    raise AssertionError("all layers ahead are known")


def _alone(reason: str) -> str:
    return f"the calibration batches ran one at a time, each from its beginning for every group of layers: {reason}"


def _without(names: Collection[str], groups: Sequence[Group]) -> list[Group]:
    left = (
        dataclasses.replace(group, names=tuple(name for name in group.names if name not in names)) for group in groups
    )
    return [group for group in left if group.names]


def _largest(targets: Sequence[Target], weights: Sequence[Tensor]) -> str:
    """Name of the layer with the largest weight."""
    largest = [float(weight.abs().max()) for weight in weights]
    return targets[largest.index(max(largest))].name


def _names(targets: Sequence[Target]) -> str:
    return ", ".join(target.name for target in targets)
