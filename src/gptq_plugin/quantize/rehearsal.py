"""Runs a few batches as a pass would, to refuse before training what `OnePass` would refuse after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.calibration.sources import least_samples
from gptq_plugin.errors import CalibrationError
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.data_checks import (
    check_enough,
    check_some_left,
    check_weight,
    count_samples,
    fewest_tokens,
    known_tokens,
    not_finite,
    unreached,
)
from gptq_plugin.quantize.gradient_weights import GradientWeights
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.prepare import collected
from gptq_plugin.quantize.sensitivity import check_batches
from gptq_plugin.walk import lockstep
from gptq_plugin.walk.groups import Group
from gptq_plugin.walk.layer_inputs import watch_inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rest:
    """The data that training will leave to calibrate on, of which a few batches are tried.

    Attributes:
        at_least: Number of samples that it surely holds, over all ranks.
        collect: Reads all of it; every rank calls it.
    """

    at_least: int
    collect: Callable[[], Calibration]


def rest_of(plan: Plan, data: Iterable[Any] | None, options: PassOptions) -> Rest | None:
    """The data that training will leave, to be collected for a plan; None without any. Every rank calls it."""
    return None if data is None else Rest(least_samples(data), partial(collected, plan, data, options))


def rehearse(
    plan: Plan, calibration: Calibration, options: PassOptions, *, whole: bool, rest: Rest | None = None
) -> None:
    """Runs one batch of each source layer by layer; nothing is quantized. In a process group every rank calls it.

    If those batches do not show that the data is long enough, others run until it is.

    Args:
        plan: The layers.
        calibration: This rank's batches, or the first of them.
        options: As for the pass.
        whole: There will be no other data.
        rest: If there will be other data: that, of which `calibration` is a part; None if it cannot be read before.

    Raises:
        CalibrationError: As `OnePass.run`.
        TargetError: A layer's weight is not finite, no layer computes x·Wᵀ + b, or the model does not compute the same
            with layers replaced.
    """
    samples, tokens = count_samples(calibration), known_tokens(calibration)
    if whole and plan.config.target_bits is not None:
        check_batches(sum(distributed.gather_objects(len(calibration.batches))))
    if whole and tokens is not None:
        check_enough(tokens, samples.count, plan)
    first = _Rehearsal(plan, calibration, options)
    first.run(calibration.first_batches, replacing=True)
    if not any(distributed.gather_objects(bool(first.entry))):
        raise unreached(plan)
    if whole:
        others = [number for number in range(len(calibration.batches)) if number not in calibration.first_batches]
        first.run(others, until=fewest_tokens(plan))
        first.check_enough(samples.count)
    elif rest is not None and not first.suffices(rest.at_least):
        everything = rest.collect()
        second = _Rehearsal(plan, everything, options)
        second.run(range(len(everything.batches)), until=fewest_tokens(plan))
        second.check_enough(count_samples(everything).count)


class _Rehearsal:
    """Runs of some batches, and what they showed.

    Attributes:
        entry: Name of the first layer that a batch reached; empty before.
        tokens: Rows that counted at its input.
    """

    def __init__(self, plan: Plan, calibration: Calibration, options: PassOptions) -> None:
        self.entry = ""
        self.tokens = 0
        self._plan = plan
        self._calibration = calibration
        self._options = options
        self._positions = Positions(plan.model, calibration.batches, plan.config.token_weighting)
        self._targets = {target.name: target for target in plan.targets}
        self._samples = 0

    def run(self, numbers: Iterable[int], until: int | None = None, *, replacing: bool = False) -> None:
        """Runs batches by number, until so many tokens have been counted on this rank.

        Args:
            numbers: The batches.
            until: Number of tokens; None is all batches.
            replacing: Judge the layers too, and compare the model with layers replaced.
        """
        modules = {name: target.module for name, target in self._targets.items()}
        groups = [Group((name,)) for name in modules]

        def walk(number: int) -> None:
            observe, forward = partial(self._check, runs, number), runs.forward(number)
            forward = runs.replaceable.watched(forward) if replacing else forward
            with self._positions.watching(), watch_inputs(modules, partial(self._count, number)):
                for _ in lockstep.walk(groups, modules, [forward], observe):
                    pass

        with BatchRuns(self._plan, self._calibration, self._positions, self._options) as runs:
            for number in numbers:
                if until is not None and self.tokens >= until:
                    break
                tokens = self.tokens
                try:
                    walk(number)
                except CalibrationError:  # padding may hold anything, and where it is has not been observed
                    self.tokens = tokens
                    runs.notice_masks(number)
                    self._positions.learn(runs.observe_positions(modules))
                    walk(number)
                self._samples += self._calibration.batches[number].samples
            if replacing:
                self._check_replaced(runs)
                if self._plan.config.token_weighting == "gradients":
                    weights = GradientWeights.of(self._plan.model, modules)
                    runs.measure(weights, self._calibration.first_batches)
        self._positions.check()

    def suffices(self, samples: int) -> bool:
        """True if so many samples like those that ran, over all ranks, are clearly enough."""
        tokens, ran = map(sum, zip(*distributed.gather_objects((self.tokens, self._samples)), strict=True))
        return tokens * max(1.0, samples / max(1, ran) / 2) >= fewest_tokens(self._plan)

    def check_enough(self, samples: int) -> None:
        """Refuses too few tokens in all ranks' runs.

        Raises:
            CalibrationError: See `data_checks.check_enough`.
        """
        check_enough(sum(distributed.gather_objects(self.tokens)), samples, self._plan)

    def _check_replaced(self, runs: BatchRuns) -> None:
        left_float = runs.replaceable.left_float()
        check_some_left(left_float, self._plan)
        for name, reason in left_float.items():
            log.warning("%s: %s: it will be left float", name, reason)
        runs.check_swap(self._targets.keys() - left_float.keys())

    def _count(self, number: int, name: str, x: Tensor) -> None:
        """Called at every call of a layer, on the batch's thread."""
        self.entry = self.entry or name
        if name == self.entry:
            self.tokens += len(self._positions.rows(number, name, x).counted)

    def _check(self, runs: BatchRuns, number: int, group: Group, _alone: int, x: Tensor) -> None:
        (name,) = group.names
        check_weight(name, runs.weights.present(self._targets[name]))
        if not torch.isfinite(self._positions.rows(number, name, x).counted).all():
            where = f"calibration batch {number} (rank {distributed.rank()})"
            raise not_finite(self._plan.model, name, where)
