"""What single quantized layers do to a model's outputs: `measure_sensitivities`, `measure_layers`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from gptq_plugin import distributed
from gptq_plugin.allocation.grids import Grid
from gptq_plugin.allocation.nearest import nearest
from gptq_plugin.allocation.units import Unit, parameter_name
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.errors import CalibrationError, TargetError
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.plan import Plan
from gptq_plugin.model.targets import Target
from gptq_plugin.options.methods import METHOD_FIELDS
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.divergence import Divergence
from gptq_plugin.quantize.kept_divergences import kept_divergences
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.quantize.prepare import prepared, undisturbed
from gptq_plugin.quantize.ran_short import run_pass, shortage_explained

log = logging.getLogger(__name__)

_WIDTHS = (2, 3, 4)  # measured; the divergence at 8 bits is below what a measurement resolves
_HELD_OUT_TOKENS = 4096  # that divergences are measured on, to 5 %, and no trial's Hessian has seen
_TRIAL_SAMPLES = 32  # that the layers of a trial are solved with


@dataclass(frozen=True)
class Sensitivities:
    """What units do to the model, each alone.

    Attributes:
        measured: By unit, then width: KL(float || that unit quantized alone), mean over positions, in nats.
        damages: By unit, the same for each of its grids, scaled from a measured one.
        tokens: Positions that were compared, over all ranks.
        quantized: Names of the layers that the trials quantized; others are to stay float after all.
    """

    measured: Mapping[str, Mapping[int, float]]
    damages: Mapping[str, Mapping[Grid, float]]
    tokens: int
    quantized: Set[str]


def measure_sensitivities(
    plan: Plan, units: Sequence[Unit], calibration: Calibration, options: PassOptions
) -> Sensitivities:
    """Quantizes the model once for each width, in a trial that nothing is kept of, and puts single units of its layers
    into the float model. Every rank calls it, and gets the same values.

    Trials use the method gptq and few samples. Divergences are measured on others. Grids of other groups, or of a width
    that is not measured, differ from a measured one as the squared errors of nearest rounding do.

    Args:
        plan: The layers.
        units: Those to choose grids for.
        calibration: This rank's batches.
        options: How batches run.

    Raises:
        CalibrationError: There are fewer than two batches; or as `Divergence` and `OnePass.run`.
        TargetError: As `Divergence` and `OnePass.run`.
    """
    held_out, others = divided(calibration)
    measured: dict[str, dict[int, float]] = {unit.name: {} for unit in units}
    tokens, quantized = 0, set[str]()
    for width in _measured_widths(units):
        started = time.perf_counter()
        layers, trial = _trial(plan, width, others, options)
        quantized |= layers.keys()
        own = [unit for unit in units if any(grid.bits == width for grid in unit.grids)]
        measure = partial(_alone, plan, own, layers, held_out, options)
        found, tokens = kept_divergences(options, trial, held_out, own, measure)
        for unit, divergence in zip(own, found, strict=True):
            measured[unit.name][width] = divergence
        if distributed.rank() == 0:
            seconds = time.perf_counter() - started
            log.info("%d units of layers, each alone at %d bits: %.1f s", len(own), width, seconds)
    return Sensitivities(
        measured, {unit.name: _damages(unit, measured[unit.name]) for unit in units}, tokens, quantized
    )


def measure_layers(plan: Plan, calibration: Calibration, options: PassOptions) -> Mapping[str, float]:
    """What each layer does to the model on the grid that it has, for each of its weights, by name.

    Experts of one parameter are measured together, and have one value. Every rank calls it, and gets the same values.

    Raises:
        CalibrationError, TargetError: As `measure_sensitivities`; or the model has no output embedding.
    """
    if plan.structure.head is None:
        raise TargetError(f"{type(plan.model).__name__} has no output embedding, by whose logits layers are measured")
    parameters: dict[str, list[Target]] = defaultdict(list)
    for target in plan.targets:
        parameters[parameter_name(target)].append(target)
    units = [Unit(name, tuple(of), (Grid.of(of[0].config),)) for name, of in parameters.items()]
    found = measure_sensitivities(plan, units, calibration, options)
    alone = {unit.name: found.damages[unit.name][unit.grids[0]] for unit in units}
    weights = {unit.name: sum(math.prod(target.shape) for target in unit.targets) for unit in units}
    return {name: alone[unit.name] / weights[unit.name] for unit in units for name in unit.names}


def measure_model(
    model: nn.Module, batches: Iterable[Any], config: QuantizeConfig, options: PassOptions
) -> Mapping[str, float]:
    """`measure_layers` of a float model, which stays as it is.

    Raises:
        CalibrationError, TargetError, RankError: As `prepared` and `measure_layers`.
    """
    with undisturbed(), prepared(model, batches, config, options) as (plan, calibration), evaluating(model):
        return measure_layers(plan, calibration, options)


def divided(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Batches to measure on, evenly spaced among those of all ranks, and others for trials: this rank's of each.

    Raises:
        CalibrationError: There are fewer than two.
    """
    total = calibration.of_all_ranks
    check_batches(total)
    own = [(number, batch.samples, batch.tokens) for number, batch in zip(
        calibration.numbers, calibration.batches, strict=True)]  # fmt: skip
    sizes = sorted(one for of_rank in distributed.gather_objects(own) for one in of_rank)
    tokens = [count if count is not None else samples for _, samples, count in sizes]
    wanted = -(-_HELD_OUT_TOKENS * total // max(1, sum(tokens)))
    count = min(max(1, wanted), max(1, total // 4))
    measured_on = {sizes[(2 * place + 1) * total // (2 * count)][0] for place in range(count)}
    rest = [one for one in sizes if one[0] not in measured_on]
    trials: set[int] = set()
    samples = 0
    for number, of_batch, _ in rest:
        if samples < _TRIAL_SAMPLES:
            trials.add(number)
            samples += of_batch
    return _part(calibration, measured_on), _part(calibration, trials)


def check_batches(count: int) -> None:
    """Raises CalibrationError if so many batches cannot be divided into those to measure on and those for trials."""
    if count < 2:
        raise CalibrationError(
            "target_bits and on_fail='escalate' measure single layers on calibration batches that these are not "
            f"calibrated on, and there is {count} batch: give more samples, or a smaller batch_size"
        )


def _part(calibration: Calibration, numbers: Collection[int]) -> Calibration:
    kept = [place for place, number in enumerate(calibration.numbers) if number in numbers]
    return Calibration(
        [calibration.batches[place] for place in kept],
        [calibration.numbers[place] for place in kept],
        len(numbers),
        first_batches=[0] if kept else [],
    )


def _measured_widths(units: Sequence[Unit]) -> list[int]:
    """The widths of trials: those of `_WIDTHS` that units can have, else their narrowest."""
    found = set()
    for unit in units:
        widths = {grid.bits for grid in unit.grids}
        found |= widths.intersection(_WIDTHS) or {min(widths)}
    return sorted(found)


def _trial(
    plan: Plan, width: int, calibration: Calibration, options: PassOptions
) -> tuple[Mapping[str, QuantLinear], str | None]:
    """The layers quantized at a width, and the hash of model and layers; those that cannot be, or are left float, are
    missing."""
    of_method: dict[str, Any] = {**dict.fromkeys(METHOD_FIELDS), "method": "gptq"}
    config = dataclasses.replace(plan.config, target_bits=None, bits=width, **of_method)
    options = dataclasses.replace(options, layers_in=None, progress=None)
    with contextlib.ExitStack() as around:
        ran = run_pass(plan.with_config(config), calibration, lambda _: options, around)
    return ran.layers, ran.one_pass.key


def _alone(
    plan: Plan, units: Sequence[Unit], layers: Mapping[str, QuantLinear], calibration: Calibration, options: PassOptions
) -> tuple[list[float], int]:
    """The divergence with each unit's layers of a trial in the float model, and the number of positions."""
    one_walk = [
        dataclasses.replace(one, config=dataclasses.replace(one.config, asymmetric_alpha=0.0)) for one in plan.targets
    ]
    every_logit = dataclasses.replace(plan.config, lm_head=True)
    measured = dataclasses.replace(plan, targets=one_walk, config=every_logit)
    positions = Positions(plan.model, calibration.batches, plan.config.token_weighting)
    found = []
    with BatchRuns(measured, calibration, positions, options) as runs, shortage_explained(runs, plan, options):
        with positions.watching():
            runs.find_groups({target.name: target.module for target in plan.targets})
        divergence = Divergence(runs, positions, plan.structure, calibration.numbers, calibration.of_all_ranks)
        for unit in units:
            quantized = [target for target in unit.targets if target.name in layers]
            for target in quantized:
                runs.weights.quantize([(target, layers[target.name], None)])
            found.append(divergence.measure() if quantized else 0.0)
            for target in quantized:
                runs.weights.restore([target.module])
    return found, divergence.tokens


def _damages(unit: Unit, measured: Mapping[int, float]) -> dict[Grid, float]:
    """The divergence for each of the unit's grids: that of the nearest width that was measured, in the unit's largest
    groups, of which all but the floor is scaled."""
    errors = {grid: _errors(unit, grid) for grid in unit.grids}
    references = {width: next(grid for grid in unit.grids if grid.bits == width) for width in measured}
    floor = _floor([(errors[references[width]], measured[width]) for width in sorted(measured)])
    damages = {}
    for grid in unit.grids:
        width = min(measured, key=lambda known: (abs(known - grid.bits), known))
        error = errors[references[width]]
        scale = errors[grid] / error if error else 1.0
        damages[grid] = floor + (measured[width] - floor) * scale
    return damages


def _floor(measured: Sequence[tuple[float, float]]) -> float:
    """The divergence that is left where errors vanish, since every change of weights moves the rounding of activations:
    by the line through the two widest widths, and 0 where that has none.

    Args:
        measured: Squared errors and divergences, the widest width last.
    """
    if len(measured) < 2:
        return 0.0
    (wide_error, narrower), (error, divergence) = measured[-2:]
    if wide_error <= error:
        return 0.0
    return min(max(0.0, divergence - error * (narrower - divergence) / (wide_error - error)), divergence)


def _errors(unit: Unit, grid: Grid) -> float:
    """The squared errors of nearest rounding, each layer's as a share of its squared weights."""
    shares = []
    for target in unit.targets:
        weight = target.weight
        _, error = nearest(weight, dataclasses.replace(target.config, **vars(grid)))
        power = float(weight.double().square().sum())
        shares.append(float(error) / power if power else 0.0)
    return sum(shares)
