"""Forwards of the calibration batches, with weights and activations on the device as far as they fit: `BatchRuns`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Batch, Calibration
from gptq_plugin.calibration.loss import reads_every_logit
from gptq_plugin.calibration.observing import Noticed, Watched, observe_positions
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.calibration.verdicts import DISTURBED, Findings
from gptq_plugin.device.memory import Peak, free_bytes, give_back, is_shortage, trimmed, with_index
from gptq_plugin.errors import TargetError, some
from gptq_plugin.export.verify_outputs import Sample
from gptq_plugin.memory import placement
from gptq_plugin.memory.activations import Activations
from gptq_plugin.memory.slots import distinct_tensors
from gptq_plugin.memory.weights import Weights, neighbour_bytes
from gptq_plugin.model.experts_at_once import as_called, calls_of
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.drifts import asks_for_drift
from gptq_plugin.quantize.first_forward import (
    Measured,
    call_again,
    found_in,
    most_tokens,
    needs_of,
    put_together,
    sizes_of,
    told_of,
)
from gptq_plugin.quantize.gradient_weights import GradientWeights
from gptq_plugin.quantize.grouped_experts import grouped_experts, solving_bytes, whole_bytes
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.replaceable import Replaceable
from gptq_plugin.quantize.swap_check import check_swap
from gptq_plugin.quantize.turns import disturbance
from gptq_plugin.walk.batch_thread import BatchThread, Forward, run_here
from gptq_plugin.walk.float_walk import Walks, serves_float
from gptq_plugin.walk.groups import Group, find_groups
from gptq_plugin.walk.kept_state import KeptState, Values

log = logging.getLogger(__name__)

_SHORT = "{} ran out of memory once, and kept as little as possible from there on"


class BatchRuns:
    """Runs this rank's batches. As a context manager it holds the weights that the model runs with.

    Args:
        plan: The layers to quantize.
        calibration: The batches.
        positions: Told which batch runs on which thread.
        options: How batches run, and how much memory there is.
        at_once: Run experts, and batches of one kind, at once where that is possible.

    Attributes:
        at_once: Experts that forwards may call at once, by name.
        calibration: The batches; put together as there is room for that, once the groups are found.
        device: Where the batches run and the layers are solved.
        run_batch: Runs the data of a batch there, as run_batch(model, data).
        weights: Inside the context.
        activations: Those of waiting batches.
        walks: Whether the float model walks too, and the numbers of the forwards then.
        replaceable: Which layers can be replaced, as the forward that finds the groups shows.
        ran_short: Batches, or parts of one, whose forwards lacked memory.
        state: Inside the context, what forwards keep on the model; complete once the groups are found.

    Raises:
        TargetError: The layers are on several devices.
        ValueError: `offload_weights` is to stream a model that is on a GPU, or one that is to run backward.
    """

    weights: Weights
    state: KeptState
    _noticed: Noticed

    def __init__(
        self, plan: Plan, calibration: Calibration, positions: Positions, options: PassOptions, *, at_once: bool = False
    ) -> None:
        self.device = _device(plan, options)
        self.run_batch = options.runner(every_logit=reads_every_logit(plan.config))
        self._run_explained = options.runner(every_logit=reads_every_logit(plan.config), explains=True)
        self.activations = Activations(self.device, None, make_room=self.make_room)
        self._kept_least, self.ran_short = False, list[Batch]()
        self._run = (0, 0)  # the running batch, and the number of runs so far
        self._entered: dict[tuple[str, int], int] = {}  # the first run of a batch that came to a block of experts
        self._plan, self.calibration = plan, calibration
        self._joins = at_once and options.joins(self.device, plan.config)
        self._positions, self._options = positions, options
        self._targets = {target.name: target for target in plan.targets}
        self.replaceable = Replaceable(plan)
        self.at_once = grouped_experts(plan, self.device, options) if at_once else {}
        self._used = self._targets | {name: self._targets[one.layers[0][0]] for name, one in self.at_once.items()}
        self.walks = Walks(frozenset(target.name for target in plan.targets if asks_for_drift(target)))

    def __enter__(self) -> BatchRuns:
        give_back(self.device, _model_bytes(self._plan, self.device, self._options))
        with contextlib.ExitStack() as entered:  # what was entered is left if the rest raises
            entered.enter_context(trimmed(self._plan.model))
            self.weights = entered.enter_context(self._make_weights())
            self.state = KeptState(self._plan.model, self.weights.is_lent, self.device if self._streams() else None)
            self._entered_contexts = entered.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered_contexts.__exit__(*error)

    def forward(self, batch: int, number: int | None = None, part: Batch | None = None) -> Forward:
        """A batch's forward for `lockstep.walk`, with that number (or the batch's) among those that take turns; of a
        part of the batch, in which no positions are told apart."""

        def run() -> Any:
            counts = not serves_float()
            self._run = (batch, self._run[1] + 1) if counts else self._run
            marked = self._positions.running(batch) if counts and part is None else contextlib.nullcontext()
            own, turn = part or self.calibration.batches[batch], batch if number is None else number
            with marked, self.activations.running(turn), _noting_shortage(self.ran_short, own):
                return self._run_explained(self._plan.model, own.data)

        return run

    def is_first_to_enter(self, experts: str) -> bool:
        """True unless an earlier run of this batch, one at a time, came to that block of experts already."""
        number, run = self._run
        return self._entered.setdefault((experts, number), run) == run

    def forwards(self) -> list[Forward]:
        """The forwards of all batches, by their numbers in `walks`."""
        return self.walks.forwards(len(self.calibration.batches), self.forward)

    @contextlib.contextmanager
    def waiting(self, number: int, name: str) -> Iterator[None]:
        """Surrounds a batch's wait at a layer, whose weights other batches may have sent home meanwhile."""
        with self.activations.waiting(number):
            yield
        self.weights.present(self._used[name])

    def not_finite(self, inputs: Mapping[int, torch.Tensor]) -> list[int]:
        """Numbers of the batches whose inputs, by their forwards' numbers, hold NaN or infinity."""
        found: dict[int, None] = {}
        for number, x in inputs.items():
            with self.activations.on_device(number):
                found |= {} if torch.isfinite(x).all() else {self.walks.batch(number): None}
        return list(found)

    def find_groups(self, layers: dict[str, nn.Module]) -> tuple[list[Group], dict[str, str]]:
        """Finds the groups with a forward of the largest batch, judges the layers by what they compute in it, and
        decides from it what stays on the device. Of a large batch the first samples run; see `found_in`.

        The models of all ranks are the same, and those of the rank with the largest batch of all are used.

        Returns:
            The groups, and why layers have to stay float, on any rank, by name.

        Raises:
            TargetError: None of the layers can be quantized.
        """
        free, measured = free_bytes(self.device, self._options.device_memory), Peak(self.device)
        groups, times, place, sizes = None, 1.0, (1, 0), sizes_of(self.calibration.batches)
        if sizes:
            largest = sizes.index(max(sizes))
            groups, times = found_in(self.calibration.batches[largest], partial(self._groups, layers, largest))
            self._joins &= not call_again(groups)
            place = (-sizes[largest], self.calibration.numbers[largest])
        self._place(free, Measured(measured.bytes(), self.activations.peak_bytes, times), sizes)
        of_all = distributed.gather_objects((place, groups))
        _, found = min((one for one in of_all if one[1] is not None), key=lambda one: one[0])
        return found, self.replaceable.settle(self.weights.present)

    def _groups(self, layers: dict[str, nn.Module], number: int, batch: Batch) -> list[Group]:
        """The groups by a forward of the batch, or of a part of it."""
        self._noticed = Noticed(self._plan.model, batch)
        part = None if batch is self.calibration.batches[number] else batch
        forward = self.replaceable.watched(self._noticed.during(self.forward(number, part=part)))
        both = layers | calls_of(self.at_once)
        return as_called(find_groups(both, forward, self.waiting, number, self.state), self.at_once)

    def check_swap(self, names: Collection[str]) -> list[str]:
        """Checks the model with these layers replaced, after the walk; see `check_swap`. Without batches, others do."""
        if not self._streams():  # or as many bytes come as of quantized layers, which are fewer
            self.weights.restore()
        sample, alone = self.sample(), partial(self.run_alone, looks=False)  # layers are replaced for it
        targets = [self._targets[name] for name in names]
        here = partial(run_here, kept=Values(self.state, alone=True, looks=False))
        return check_swap(self._plan.model, targets, sample, alone, here) if sample is not None else []

    def run_alone(self, forward: Forward, number: int = 0, *, looks: bool = True) -> None:
        """Runs a forward from the state that the model was given in; what it keeps on the model is dropped."""
        BatchThread(number, forward, kept=Values(self.state, alone=True, looks=looks)).resume()

    def measure(self, weights: GradientWeights, numbers: Iterable[int]) -> None:
        """Runs batches forward and backward, each from the state that the model was given in."""
        for number in numbers:
            forward, data = self.forward(number), self.calibration.batches[number].data
            self.run_alone(partial(weights.measure, number, forward, data), number)

    def sample(self) -> Sample | None:
        """The first batch, cut to a sample; None without batches on this rank."""
        first = next(iter(self.calibration.batches), None)
        return None if first is None else Sample.of(first.data, self.run_batch, self.device)

    def disturbance(self, layers: Mapping[str, nn.Module]) -> str | None:
        """Returns why the batches cannot take turns, on any rank; None if they can. After `find_groups`."""
        run = partial(self._run_explained, self._plan.model)
        two = [batch.data for batch in self.calibration.batches[:2]]
        own = disturbance(
            layers, two, run, lambda name: self.weights.present(self._used[name]), self.state, self.walks.two
        )
        return next(filter(None, distributed.gather_objects(own)), None)

    def make_room(self) -> bool:
        """Keeps as little as possible on the device, after an allocation failed; returns False if it did already."""
        freed = [self.activations.keep_least(), self.weights.keep_least()]
        if any(freed):
            log.warning("no room on %s: from here on as little as possible is kept there", self.device)
            self._kept_least = True
        give_back(self.device)
        return any(freed)

    def notice_masks(self, number: int) -> None:
        """Runs a batch for the masks in its calls alone; `find_groups` notices them by the way."""
        self._noticed = Noticed(self._plan.model, self.calibration.batches[number])
        self.run_alone(self._noticed.during(self.forward(number)), number)

    def observe_positions(
        self, layers: Mapping[str, nn.Module], disturbance: str | None = None, groups: Sequence[Group] | None = None
    ) -> Findings:
        """Observes which rows of the layers' inputs belong to padding, in a few samples; once masks were noticed.

        Args:
            layers: By name.
            disturbance: Why batches cannot take turns.
            groups: From `find_groups`. If no layer is called twice, the first blocks show what holds for all.
        """
        if not self.calibration.batches:
            return Findings()
        if disturbance is not None:
            return Findings(masks=dict.fromkeys(self._noticed.keys(), DISTURBED))
        blocks = self._positions.blocks
        whole = groups is None or any(group.calls > 1 for group in groups)
        watched = Watched(self._plan.model, layers, blocks, self._run_variant, self.waiting, self.state, whole)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return observe_positions(watched, self.calibration.batches, self._noticed)

    def _run_variant(self, number: int, data: Any) -> Any:
        with self.activations.running(number):
            return self.run_batch(self._plan.model, data)

    def over_budget(self) -> list[str]:
        """Sentences if any rank's device had no room, or more was there than `device_memory` allows. Collective."""
        short = dict.fromkeys(distributed.gather_objects(_SHORT.format(self.device) if self._kept_least else None))
        return [*filter(None, short), *placement.beyond(self.device, self._options.device_memory)]

    def _make_weights(self) -> Weights:
        """Gives weights half of the free memory for the first forward, which shows what else needs room."""
        options, free = self._options, free_bytes(self.device, self._options.device_memory)
        weights = Weights(
            self._plan.model,
            self.device,
            stream=self._streams(),
            capacity=placement.UNLIMITED if free is None or options.offload_weights is False else free // 2,
            unit_bytes=max(placement.unit_bytes(self._plan.model, free), whole_bytes(self.at_once.values())),
            two_walks=self.walks.two,
            make_room=self.make_room,
        )
        if options.offload_weights:
            weights.capacity = weights.min_resident_bytes
        return weights

    def _streams(self) -> bool:
        return self._plan.targets[0].parameter.device != self.device or bool(self._options.offload_weights)

    def _place(self, free: int | None, forward: Measured, sizes: Sequence[int]) -> None:
        """Decides what stays on the device, and which batches run together, by the bytes free before the first forward,
        what that took, and the batches' sizes."""
        options, is_cpu = self._options, self.device.type == "cpu"
        solver = solving_bytes(self.at_once.values(), self._plan, self.device, options)
        needs = needs_of(self._plan, self.device, self.weights, solver, forward, sizes, 1 + self.walks.two)
        least = neighbour_bytes(self.weights) if is_cpu else self.weights.min_resident_bytes
        offload = options.offload_weights, options.offload_activations

        def place(needs: placement.Needs) -> placement.Placement:
            return placement.place(self.device, free, needs, least, *offload)

        if sizes and self._joins:
            given = self.calibration, sizes, most_tokens(self._plan), free, needs, place, options.most_samples
            self.calibration, needs = put_together(*given)
            self._positions.join(self.calibration.batches)
            self._entered_contexts.push(told_of(self.calibration))
        placed = place(needs)
        log.log(logging.INFO if self.device.type == "cuda" or placed.limited else logging.DEBUG, placed.summary)
        self.weights.capacity = placed.weights
        self.activations = Activations(
            self.device, placed.activations, prefetch=placed.prefetch, make_room=self.make_room
        )


@contextlib.contextmanager
def _noting_shortage(short: list[Batch], batch: Batch) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        short += [batch] if is_shortage(error) else []
        raise


def _model_bytes(plan: Plan, device: torch.device, options: PassOptions) -> int | None:
    """Bytes of the model on a device; None where its memory is limited, and every byte counts."""
    if options.device_memory is not None or device.type == "cpu":
        return None
    device = with_index(device)
    return sum(one.nbytes for one in distinct_tensors(plan.model) if one.device == device)


def _device(plan: Plan, options: PassOptions) -> torch.device:
    devices = {str(target.parameter.device): target.name for target in plan.targets}
    if len(devices) > 1:
        raise TargetError(
            f"the layers to quantize are on several devices ({some([f'{n} on {d}' for d, n in devices.items()])}): "
            "move the model to one, or load it on the CPU and give quantize(..., device='cuda')"
        )
    home = plan.targets[0].parameter.device
    device = options.where or home
    if plan.config.token_weighting == "gradients" and (device != home or options.offload_weights):
        raise ValueError(
            f"token_weighting='gradients' runs the model backward, on {device}, and its weights would come there only "
            f"for a while: call model.to({str(device)!r}) first, with offload_weights at null, or give "
            "token_weighting='all'"
        )
    if options.offload_weights and device.type == home.type == "cuda":
        raise ValueError(
            f"offload_weights=True streams a model from the CPU, and this one is on {home}: call model.to('cpu') "
            f"first, and give quantize(..., device={str(device)!r})"
        )
    return device
