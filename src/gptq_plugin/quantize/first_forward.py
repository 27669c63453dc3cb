"""What the first forward of a pass shows: how much memory its batches need, and which of them may run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Batch, Calibration
from gptq_plugin.calibration.joined import joined
from gptq_plugin.memory import placement
from gptq_plugin.memory.placement import Needs, Placement
from gptq_plugin.memory.weights import Weights
from gptq_plugin.model.plan import Plan

_MOST, _NUMBERED = 2**17, 2**31


@dataclass(frozen=True)
class Measured:
    """A forward of the largest batch, or of a part of it.

    Attributes:
        peak: The most bytes on the device.
        waiting: The most bytes of activations while it waited.
        times: The batch in parts of what ran of it.
    """

    peak: int
    waiting: int
    times: float = 1.0


def needs_of(
    plan: Plan,
    device: torch.device,
    weights: Weights,
    solver: int,
    forward: Measured,
    sizes: Sequence[int],
    walks: int,
) -> Needs:
    """What a pass wants on the device.

    Args:
        plan: The layers.
        device: Where the batches run.
        weights: Those of the model, as the forward left them.
        solver: Bytes of the solver's tensors.
        forward: The first one.
        sizes: Of all batches: the largest one's activations and all have these proportions.
        walks: Number of forwards of a batch.
    """
    waiting = int(forward.waiting * forward.times)
    return Needs(
        weights=weights.total_bytes,
        fixed=placement.fixed_bytes(plan.targets, device, len(sizes) * walks),
        solver=solver,
        forward=int((forward.peak - weights.peak_bytes) * forward.times),
        activations=int(waiting * (sum(sizes) / max([1, *sizes]))) * walks,
        batch=waiting,
    )


def put_together(
    calibration: Calibration,
    sizes: Sequence[int],
    most: int,
    free: int | None,
    needs: Needs,
    placed: Callable[[Needs], Placement],
) -> tuple[Calibration, Needs]:
    """Batches put together as far as there is room for their forward, and what is needed then.

    Args:
        calibration: The batches.
        sizes: Of each.
        most: The largest size of several together.
        free: Bytes free on the device; None if that is not known.
        needs: Of the batches as they are.
        placed: See `placement.room_for`.
    """
    largest = max([1, *sizes])
    times = placement.room_for(free, needs, min(most, sum(sizes)) / largest, placed)
    return joined(calibration, sizes, int(times * largest)), needs.joined(times)


def sizes_of(batches: Sequence[Batch]) -> list[int]:
    """Numbers to which the batches' activations are proportional: tokens, or samples if some do not tell tokens, on any
    rank."""
    tokens = [batch.tokens for batch in batches]
    known = [count for count in tokens if count is not None]
    all_know = distributed.minimum(len(known) == len(tokens))
    return known if all_know else [batch.samples for batch in batches]


def most_tokens(plan: Plan) -> int:
    """The size up to which batches are put together. More make no forward faster for each token, and the elements of a
    layer's input or output can still be numbered in 32 bits, as kernels of others may do."""
    return min(_MOST, _NUMBERED // max(max(target.shape) for target in plan.targets))
