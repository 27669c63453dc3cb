"""Runs a few batches as a pass would, to refuse before training what `OnePass` would refuse after it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.calibration.positions import Positions
from gptq_plugin.model.plan import Plan
from gptq_plugin.quantize.batch_runs import BatchRuns
from gptq_plugin.quantize.data_checks import check_enough, count_samples, known_tokens, not_finite, unreached
from gptq_plugin.quantize.options import PassOptions
from gptq_plugin.walk import lockstep
from gptq_plugin.walk.groups import Group


def rehearse(plan: Plan, calibration: Calibration, options: PassOptions, *, whole: bool) -> None:
    """Runs one batch of each source layer by layer; nothing is quantized. In a process group every rank calls it.

    Args:
        plan: The layers.
        calibration: This rank's batches, or the first of them.
        options: As for the pass.
        whole: There will be no other data, so its length is checked too.

    Raises:
        CalibrationError: As `OnePass.run`.
    """
    samples, tokens = count_samples(calibration), known_tokens(calibration)
    if whole and tokens is not None:
        check_enough(tokens, samples.count, plan)
    modules = {target.name: target.module for target in plan.targets}
    groups = [Group((name,)) for name in modules]
    positions = Positions(plan.model, calibration.batches, plan.config.token_weighting)
    reached: set[str] = set()

    def observe(number: int, group: Group, _alone: int, x: Tensor) -> None:
        name = group.names[0]
        if not torch.isfinite(positions.rows(number, name, x).counted).all():
            raise not_finite(name, f"calibration batch {number} (rank {distributed.rank()})")
        reached.add(name)

    with BatchRuns(plan, calibration, positions, options) as runs, positions.watching():
        for number in calibration.first_batches:
            for _ in lockstep.walk(groups, modules, [runs.forward(number)], partial(observe, number)):
                pass
    positions.check()
    if not any(distributed.gather_objects(bool(reached))):
        raise unreached(plan)
