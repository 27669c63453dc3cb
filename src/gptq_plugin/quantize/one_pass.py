"""One quantization on its way through the model: Hessian → solve → the quantized weight in the layer's place.

The model's own modules and parameters stay what they are: while the batches walk, modules point to other tensors
(`weights.py`), and the finished layers are kept aside. So a failure anywhere leaves the float model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Batch, Calibration
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.device.memory import Peak, free_bytes, peak_bytes
from gptq_plugin.device.streams import AsyncRead, Stopwatch
from gptq_plugin.errors import CalibrationError, TargetError, some
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.memory import placement
from gptq_plugin.memory.activations import Activations
from gptq_plugin.memory.finished_layers import FinishedLayers
from gptq_plugin.memory.weights import Weights
from gptq_plugin.model.experts import experts_of, in_expert
from gptq_plugin.model.linears import linear_shape
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Skipped, Target
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.solve_on_ranks import solve_shared
from gptq_plugin.report.report import ModuleReport, QuantizeReport
from gptq_plugin.walk import lockstep
from gptq_plugin.walk.batch_thread import Forward
from gptq_plugin.walk.expert_hessians import Evidence, ExpertHessians
from gptq_plugin.walk.groups import Group, find_groups
from gptq_plugin.walk.hessian import Hessian
from gptq_plugin.walk.ranges import Ranges, near_float16
from gptq_plugin.walk.weight_reads import WeightReads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Solved:
    """What there is to say of a layer, before the device got to it: nothing of this is looked at during the walk.

    Attributes:
        target: The layer.
        losses: [2, layers], theirs and round-to-nearest's, summed over rows.
        number: Of the layer among them.
        share: Of the time.
        stopwatch: Of all.
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

    def report(self, max_input: float, max_output: float) -> ModuleReport:
        loss, rtn_loss = (of_all[self.number] for of_all in self.losses.get())
        near = near_float16(max_input, max_output)
        return module_report(
            self.target,
            method=self.method,
            loss=loss,
            rtn_loss=rtn_loss,
            tokens=self.tokens,
            damp_percent=self.damp_percent,
            seconds=self.stopwatch.seconds() * self.share,
            max_input=max_input,
            max_output=max_output,
            deviations=self.deviations if near is None else (*self.deviations, near),
        )


class OnePass:
    """One quantization: what is asked, and what has been found so far.

    Args:
        plan: What is quantized.
        calibration: The batches.
        options: How the pass runs.

    Raises:
        TargetError: The layers are on several devices.
        ValueError: `offload_weights` is to stream a model that is on a GPU.
    """

    def __init__(self, plan: Plan, calibration: Calibration, options: PassOptions) -> None:
        self.config = plan.config
        self.model = plan.model
        self.targets = plan.targets
        self.skipped = plan.skipped
        self.calibration = calibration
        self.options = options
        self.device = _device(plan.targets, options)
        self.forward = options.runner(every_logit=plan.config.lm_head)
        self.offload_weights = options.offload_weights
        self.offload_activations = options.offload_activations
        self.device_memory = options.device_memory
        self.solved: dict[str, _Solved] = {}
        self.hessians: dict[tuple[str, ...], Hessian] = {}
        self.remarks: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.returned: dict[str, int] = defaultdict(int)  # calls after a layer was solved
        self.read_elsewhere: set[str] = set()  # layers whose weights the model reads by itself
        self.read_tokens: set[str] = set()  # experts' layers, see `positions.Rows`
        self.stopwatches: list[Stopwatch] = []
        self.samples = 0
        self.sha256 = ""  # of what the samples of all ranks hold
        self.run_id = ""
        self.activations = Activations(self.device, None)
        self.ranges = Ranges()
        self.positions = Positions(self.model, self.calibration.batches, self.config.token_weighting)
        self.expert_hessians = ExpertHessians(self.device)
        self._by_name = {target.name: target for target in self.targets}
        self._of_experts: dict[str | None, list[Target]] = defaultdict(list)
        for target in self.targets:
            self._of_experts[experts_of(target.name, target.module)].append(target)
        self._experts: str | None = None  # those the walk is in

    def run(self) -> tuple[dict[str, QuantLinear], QuantizeReport]:
        """The finished layers, on the model's device, and what happened to all of them."""
        started = time.perf_counter()
        self.samples = self._count_samples(self.calibration.digest, uuid.uuid4().hex)
        modules = {target.name: target.module for target in self.targets}
        forwards = [self._forward(number, batch) for number, batch in enumerate(self.calibration.batches)]
        notes = lockstep.Notes()
        home = self.targets[0].weight.device
        self.results = FinishedLayers(home, self.options.layers_in)
        with contextlib.closing(self.results), self._weights() as self.weights, self.positions.watching(self._entered):
            groups = self._plan(modules, forwards)
            planned = time.perf_counter() - started
            with self.ranges.watching(modules):
                for stop in lockstep.walk(
                    groups,
                    modules,
                    forwards,
                    self._observe,
                    distributed.minimum,
                    notes,
                    self._waiting,
                ):
                    self.results.take_home()
                    self._quantize_group([self._by_name[name] for name in stop.group.names], stop)
                self._leave_experts(None)
            self.results.take_home(wait=True)
        reports = self._reports()
        solving = sum(stopwatch.seconds() for stopwatch in self.stopwatches)
        seconds = {"plan": planned, "calibrate": time.perf_counter() - started - planned - solving, "solve": solving}
        return self.results.layers, self._report(reports, notes, seconds)

    def rehearse(self, whole: bool) -> None:
        """One batch of each source on each rank through the model, layer by layer, with nothing quantized."""
        self.samples = self._count_samples()
        known = [batch.tokens for batch in self.calibration.batches]
        totals = distributed.gather_objects(None if None in known else sum(n for n in known if n is not None))
        if whole and None not in totals:
            self._check_enough(sum(totals))
        modules = {target.name: target.module for target in self.targets}
        groups = [Group((name,)) for name in modules]
        reached: set[str] = set()

        def observe(number: int, group: Group, _alone: int, x: Tensor) -> None:
            rows = self.positions.rows(number, group.names[0], x).counted
            if not torch.isfinite(rows).all():
                raise CalibrationError(
                    _not_finite(group.names[0], f"calibration batch {number} (rank {distributed.rank()})")
                )
            reached.add(group.names[0])

        with self._weights(), self.positions.watching():
            for number in self.calibration.first_batches:
                forward = self._forward(number, self.calibration.batches[number])
                for _ in lockstep.walk(groups, modules, [forward], partial(observe, number)):
                    pass
        self.positions.check()
        if not any(distributed.gather_objects(bool(reached))):
            raise CalibrationError(self._unreached())

    def _count_samples(self, digest: int = 0, run_id: str = "") -> int:
        """Those of all ranks; the same meeting adds up the ranks' digests and gives all the first one's run id."""
        counts, digests, run_ids = zip(
            *distributed.gather_objects((self.calibration.samples, digest, run_id)), strict=True
        )
        if not sum(counts):
            dropped = "; ".join(self.calibration.deviations)
            raise CalibrationError(f"the calibration set is empty{f': {dropped}' if dropped else ''}")
        self.sha256, self.run_id = f"{sum(digests) % 2**256:064x}", run_ids[0]
        return sum(counts)

    def _forward(self, number: int, batch: Batch) -> Forward:
        def run() -> Any:
            self.positions.runs(number)
            with self.activations.running(number):
                return self.forward(self.model, batch.data)

        return run

    @contextlib.contextmanager
    def _waiting(self, number: int, name: str) -> Iterator[None]:
        """A batch waits at a layer; when it goes on, others may have sent the layer's weights home meanwhile."""
        with self.activations.waiting(number):
            yield
        self.weights.present(self._by_name[name])

    def _weights(self) -> Weights:
        """For the first forward, half of what is free is for the weights; then `_plan` knows what else needs room."""
        free = free_bytes(self.device, self.device_memory)
        weights = Weights(
            self.model,
            self.device,
            stream=self.targets[0].weight.device != self.device or bool(self.offload_weights),
            capacity=placement.UNLIMITED if free is None or self.offload_weights is False else free // 2,
            unit_bytes=placement.unit_bytes(self.model, free),
        )
        if self.offload_weights:
            weights.capacity = weights.min_resident_bytes
        return weights

    def _plan(self, modules: dict[str, nn.Module], forwards: list[Forward]) -> list[Group]:
        """The groups, from the forward of the largest batch, which also shows what has to be where in the walk.

        Rank by rank the models are the same, so the first rank that has a batch plans for all.
        """
        free, measured = free_bytes(self.device, self.device_memory), Peak(self.device)
        plan, share = None, 0.0
        if forwards:
            sizes = self._sizes()
            largest = sizes.index(max(sizes))
            reads = WeightReads(self.model, modules)

            def forward() -> Any:
                with reads.watching():
                    return forwards[largest]()

            plan = find_groups(modules, forward, self._waiting, largest)
            share = sum(sizes) / max(1, sizes[largest])
        placed = placement.place(
            self.device,
            free,
            placement.Needs(
                weights=self.weights.total_bytes,
                fixed=placement.fixed_bytes(self.targets, self.device, len(forwards)),
                solver=placement.solver_bytes(self.targets),
                forward=measured.bytes() - self.weights.peak_bytes,
                activations=int(self.activations.peak_bytes * share),
                batch=self.activations.peak_bytes,
            ),
            self.weights.min_resident_bytes,
            self.offload_weights,
            self.offload_activations,
        )
        log.log(logging.INFO if self.device.type == "cuda" or placed.limited else logging.DEBUG, placed.summary)
        self.weights.capacity = placed.weights
        self.activations = Activations(self.device, placed.activations, prefetch=placed.prefetch)
        plans = distributed.gather_objects((plan, reads.names if plan is not None else set()))
        self._leave_float(set().union(*(names for _, names in plans)), modules)
        groups: list[Group] = next(p for p, _ in plans if p is not None)
        return [group for group in (_without(self.read_elsewhere, g) for g in groups) if group.names]

    def _leave_float(self, names: set[str], modules: dict[str, nn.Module]) -> None:
        """Layers whose weights the model reads by itself stay float: nobody waits there."""
        self.read_elsewhere |= names
        for name in names:
            del modules[name]

    def _sizes(self) -> list[int]:
        """What the batches' activations are proportional to: tokens, or samples where tokens are not known."""
        tokens = [batch.tokens for batch in self.calibration.batches]
        known = [count for count in tokens if count is not None]
        return known if len(known) == len(tokens) else [batch.samples for batch in self.calibration.batches]

    def _observe(self, group: Group, number: int, x: Tensor) -> None:
        with self.activations.untracked():
            hessian, first = self._hessian(group), group.names[0]
            rows = self.positions.rows(number, first, x)
            if rows.remark is not None:
                self.remarks[first][rows.remark] += 1
            if rows.are_tokens:
                self.read_tokens.add(first)
            hessian.add(rows.counted)
            self.ranges.read(group.names, x)

    def _entered(self, experts: str, rows: Tensor) -> None:
        with self.activations.untracked():
            self.expert_hessians.entered(experts, rows)

    def _hessian(self, group: Group) -> Hessian:
        if group.names not in self.hessians:
            in_features = self._by_name[group.names[0]].weight.shape[1]
            self.hessians[group.names] = Hessian(in_features, self.device)
        return self.hessians[group.names]

    def _quantize_group(self, members: list[Target], stop: lockstep.Stop) -> None:
        members = [target for target in members if target.name not in self.solved]
        if not members:  # a batch came back to experts that the walk had left
            self.hessians.pop(stop.group.names, None)
            self.returned[stop.group.names[0]] += len(stop.inputs)
            return
        self._leave_experts(experts_of(members[0].name, members[0].module))
        evidence = self._evidence(members[0], stop.group)
        if not self.solved:
            self._check_enough(evidence.tokens)
        # Layers of one configuration are one matrix to the solver: their rows do not know each other.
        alike: dict[str, list[Target]] = defaultdict(list)
        for target in members:
            alike[repr(target.config)].append(target)
        remarks = self.remarks.pop(stop.group.names[0], {})
        for same in alike.values():
            self._solve(same, evidence, remarks, stop)

    def _evidence(self, first: Target, group: Group) -> Evidence:
        """The group's Hessian over all ranks, and the tokens in it; the sum goes, it is as large as the mean."""
        hessian = self._hessian(group)
        del self.hessians[group.names]
        hessian.over_ranks()
        experts = experts_of(first.name, first.module)
        if experts is not None and hessian.tokens:
            layers = [in_expert(experts, name) for name in group.names]
            reads = self.expert_hessians.reads_tokens(experts, layers, group.names[0] in self.read_tokens)
            return self.expert_hessians.weighted(experts, reads, hessian)
        tokens, width = hessian.tokens, len(hessian.sum)
        few = f"only {tokens} calibration tokens for {width} inputs: the Hessian is singular"
        return Evidence(hessian.mean(), tokens, deviations=(few,) if 0 < tokens < width else ())

    def _solve(self, same: list[Target], evidence: Evidence, remarks: dict[str, int], stop: lockstep.Stop) -> None:
        names = ", ".join(target.name for target in same)
        stopwatch = Stopwatch(self.device)
        weights = [self.weights.present(target) for target in same]
        mean, config = evidence.mean, same[0].config
        if evidence.damp_percent > config.damp_percent:
            config = dataclasses.replace(config, damp_percent=evidence.damp_percent)
        try:
            solution = solve_shared(weights[0] if len(weights) == 1 else torch.cat(weights), mean, config)
        except ValueError as error:
            self._check_finite(same, stop, mean)
            raise TargetError(f"{names}: {error}") from error
        del weights
        w = solution.weight
        deviations = solution.deviations + tuple(f"{remark} ({n} batches)" for remark, n in remarks.items())
        deviations += evidence.deviations
        rows = [target.weight.shape[0] for target in same]
        sums = [torch.stack([part.sum() for part in loss.split(rows)]) for loss in (solution.loss, solution.rtn_loss)]
        losses = AsyncRead(torch.stack(sums))
        start = 0
        for number, (target, count) in enumerate(zip(same, rows, strict=True)):
            layer = QuantLinear.from_quantized(w.rows(start, start + count), target.bias, target.parameter.dtype)
            self.weights.quantize(target, layer)
            self.results.add(target.name, layer)
            self.solved[target.name] = _Solved(
                target,
                losses,
                number,
                share=count / sum(rows),
                stopwatch=stopwatch,
                method=solution.method,
                damp_percent=solution.damp_percent,
                tokens=evidence.tokens,
                deviations=deviations,
            )
            start += count
        stopwatch.stop()
        self.stopwatches.append(stopwatch)
        if self.options.progress is not None:
            self.options.progress(len(self.solved), len(self.targets), names)

    def _check_finite(self, members: list[Target], stop: lockstep.Stop, mean: Tensor) -> None:
        if torch.isfinite(mean).all():
            return
        guilty = []
        for number, x in stop.inputs.items():
            with self.activations.on_device(number):
                if not torch.isfinite(x).all():
                    guilty.append(number)
        everyones = distributed.gather_objects(guilty)
        where = [f"calibration batches {one} (rank {rank})" for rank, one in enumerate(everyones) if one]
        raise CalibrationError(_not_finite(members[0].name, ", ".join(where) or "the sum over all batches"))

    def _check_enough(self, tokens: int) -> None:
        least = min(target.weight.shape[1] for target in self.targets)
        if tokens < least:
            raise CalibrationError(
                f"the calibration set is too short: {tokens} tokens in {self.samples} samples, while even the "
                f"narrowest layer has {least} inputs, so no Hessian would have full rank. Give more samples "
                f"(nsamples is {self.config.nsamples}) or longer ones (model_seqlen is {self.config.model_seqlen})"
                + (", or count all tokens: token_weighting is 'labels'" if self.config.token_weighting != "all" else "")
            )

    def _leave_experts(self, entered: str | None) -> None:
        """The walk goes on to other layers: what no token of these experts reached is quantized too, since clients take
        experts quantized alike or not at all."""
        left, self._experts = self._experts, entered
        if left is None or left == entered:
            return
        for target in self._of_experts[left]:
            if target.name in self.solved:
                continue
            reads = self.expert_hessians.reads_tokens(left, [in_expert(left, target.name)], False)
            weight = self.weights.present(target)
            evidence = self.expert_hessians.weighted(left, reads, Hessian(weight.shape[1], self.device))
            stop = lockstep.Stop(Group((target.name,)), {})
            self._solve([target], evidence, self.remarks.pop(target.name, {}), stop)
        self.expert_hessians.leave(left)

    def _reports(self) -> list[ModuleReport]:
        """Of all targets, in their order."""
        if not self.solved:
            raise CalibrationError(self._unreached())
        ranges = self.ranges.over_ranks(self._by_name, self.device)
        reports = []
        for target in self.targets:
            if target.name in self.solved:
                reports.append(self.solved[target.name].report(*ranges[target.name]))
                continue
            read = target.name in self.read_elsewhere
            reason = "the model reads its weight by itself" if read else "never called in calibration"
            reason += ": left float"
            reports.append(module_report(target, method="float", reason=reason, deviations=(reason,)))
        return reports

    def _unreached(self) -> str:
        return (
            f"no calibration batch reached any of the {len(self.targets)} layers to quantize, such as "
            f"{self.targets[0].name}: the forward runs other modules than {type(self.model).__name__}'s"
        )

    def _report(self, reports: list[ModuleReport], notes: lockstep.Notes, seconds: dict[str, float]) -> QuantizeReport:
        late = _added_up({**notes.late, **self.returned})
        deviations: list[str] = []
        for one in distributed.gather_objects(self.calibration.deviations):
            deviations += [deviation for deviation in one if deviation not in deviations]
        peak = peak_bytes(self.device)
        if peak is not None and self.device_memory is not None and peak > self.device_memory:
            deviations.append(
                f"{peak / 2**20:.0f} MiB on {self.device} at the peak, where {self.device_memory / 2**20:.0f} were "
                "allowed: as little as possible was kept there"
            )
        if self.samples < self.config.nsamples:
            deviations.append(f"{self.samples} calibration samples used, nsamples={self.config.nsamples} asked")
        deviations += [f"{n} calibration batches {note}" for note, n in _added_up(self.positions.notes()).items() if n]
        deviations += [
            f"{name}: {calls} calls came after it was quantized; their inputs are not in its Hessian"
            for name, calls in late.items()
        ]
        damped = [one for one in self.solved.values() if one.damp_percent > one.target.config.damp_percent]
        few = [one for one in damped if experts_of(one.target.name, one.target.module) is not None]
        if few:
            most = max(one.damp_percent for one in few)
            deviations.append(
                f"{len(few)} layers of experts are damped more than damp_percent says, up to {most:.2g}, for the few "
                "tokens that were routed to them"
            )
        return QuantizeReport(
            self.config,
            reports + float_reports(self.skipped),
            samples=self.samples,
            tokens=max(report.tokens for report in reports),
            seconds=seconds,
            deviations=deviations,
            calibration="; ".join(f"{n} samples of {name}" for name, n in _added_up(self.calibration.sources).items()),
            calibration_sha256=self.sha256,
            run_id=self.run_id,
        )


def _device(targets: Sequence[Target], options: PassOptions) -> torch.device:
    """The device that the batches run on and the layers are solved on."""
    devices = {str(target.weight.device): target.name for target in targets}
    if len(devices) > 1:
        raise TargetError(
            f"the layers to quantize are on several devices ({some([f'{n} on {d}' for d, n in devices.items()])}): "
            "move the model to one, or load it on the CPU and give quantize(..., device='cuda')"
        )
    home = targets[0].weight.device
    device = options.where or home
    if options.offload_weights and device.type == home.type == "cuda":
        raise ValueError(
            f"offload_weights=True streams a model from the CPU, and this one is on {home}: call model.to('cpu') "
            f"first, and give quantize(..., device={str(device)!r})"
        )
    return device


def _without(names: set[str], group: Group) -> Group:
    return dataclasses.replace(group, names=tuple(name for name in group.names if name not in names))


def _added_up(counts: dict[str, int]) -> dict[str, int]:
    """The sums over all ranks."""
    sums: dict[str, int] = defaultdict(int)
    for one in distributed.gather_objects(counts):
        for name, count in one.items():
            sums[name] += count
    return sums


def _not_finite(layer: str, where: str) -> str:
    return (
        f"the input of {layer} holds NaN or infinity in {where}. Look for broken samples, or run the model in a wider "
        "dtype: float16 overflows at 65504"
    )


def module_report(target: Target, method: str, **values: Any) -> ModuleReport:
    is_float = method == "float"
    values["deviations"] = (*(() if is_float else target.deviations), *values.get("deviations", ()))
    return ModuleReport(
        name=target.name,
        method=method,
        bits=None if is_float else target.config.bits,
        group_size=None if is_float else target.config.group_size,
        shape=(target.weight.shape[0], target.weight.shape[1]),
        stored_bytes=0 if is_float else stored_bytes(target.weight.shape, target.config),
        **values,
    )


def float_reports(skipped: Sequence[Skipped]) -> list[ModuleReport]:
    reports = []
    for skip in skipped:
        out_features, in_features = linear_shape(skip.module)
        reports.append(
            ModuleReport(
                skip.name,
                "float",
                None,
                None,
                (out_features, in_features),
                reason=skip.reason,
                deviations=() if skip.asked else (skip.reason,),
            )
        )
    return reports
