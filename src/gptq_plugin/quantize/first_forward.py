"""What the first forward of a pass shows: how much memory its batches need, and which of them may run together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.calibration.batches import leaves
from gptq_plugin.calibration.collect import Batch, Calibration
from gptq_plugin.calibration.few_samples import of_few
from gptq_plugin.calibration.joined import joined
from gptq_plugin.errors import CalibrationError, some
from gptq_plugin.memory import placement
from gptq_plugin.memory.placement import Needs, Placement
from gptq_plugin.memory.weights import Weights
from gptq_plugin.model.plan import Plan
from gptq_plugin.walk.batch_thread import add_note
from gptq_plugin.walk.groups import Group

log = logging.getLogger(__name__)

_MOST, _NUMBERED = 2**17, 2**31
_FIRST = 2**14  # tokens of the first forward, which finds out about layers and not about data


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
    most_samples: int | None = None,
) -> tuple[Calibration, Needs]:
    """Batches put together as far as there is room for their forward, and what is needed then.

    Args:
        calibration: The batches.
        sizes: Of each.
        most: The largest size of several together.
        free: Bytes free on the device; None if that is not known.
        needs: Of the batches as they are.
        placed: See `placement.room_for`.
        most_samples: As for `joined`.
    """
    largest = max([1, *sizes])
    times = min(most, sum(sizes)) / largest
    if most_samples is not None:
        times = min(times, most_samples / max(1, calibration.most_samples))
    if not all(map(_is_of_tokens, calibration.batches)):  # no tensor has more elements than 32 bits number even then
        times = min(times, 2 * _NUMBERED / max(1, needs.forward))
    times = placement.room_for(free, needs, times, placed)
    return joined(calibration, sizes, int(times * largest), most_samples), needs.joined(times)


def sizes_of(batches: Sequence[Batch]) -> list[int]:
    """Numbers to which the batches' activations are proportional: tokens, padding too, or samples if some do not tell
    tokens, on any rank."""
    tokens = [batch.positions for batch in batches]
    known = [count for count in tokens if count is not None]
    all_know = distributed.minimum(len(known) == len(tokens))
    return known if all_know else [batch.samples for batch in batches]


def found_in(batch: Batch, groups: Callable[[Batch], list[Group]]) -> tuple[list[Group], float]:
    """The groups of layers by the first samples of a batch, or by all of it where layers are called more than once:
    perhaps for each sample. The memory that a batch takes is at most as many times that of its first samples.

    Args:
        batch: The largest one.
        groups: Finds them by a forward of a batch.

    Returns:
        The groups, and how many times the samples that ran the batch has.
    """
    found, times = of_few(batch, _FIRST, groups)
    return (groups(batch), 1.0) if times > 1 and call_again(found) else (found, times)


def call_again(groups: Sequence[Group]) -> bool:
    """True if a forward calls a layer more than once: for more samples it may do so more often."""
    return any(group.calls > 1 for group in groups)


def told_of(calibration: Calibration) -> Callable[..., None]:
    """Logs how many samples run in a forward. What it returns, called as a context's exit, notes that with an error."""
    samples = calibration.most_samples
    log.info("up to %d samples in a forward", samples)

    def leave(kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            add_note(error, f"up to {samples} samples ran in a forward, since batch_size is null: it may be a number")

    return leave


def refuse_late(late: Mapping[str, int], calibration: Calibration, collected: Calibration) -> None:
    """Refuses calls that came after their layer was quantized, where batches were put together.

    Args:
        late: Their number by layer.
        calibration: The batches as they ran.
        collected: As they were.

    Raises:
        CalibrationError: There are any: what came late would not have counted.
    """
    if late and len(calibration.batches) < len(collected.batches):
        raise CalibrationError(
            f"with up to {calibration.most_samples} samples in a forward it calls "
            f"{some(sorted(late))} more often than with a few, and what came late would not have counted: give "
            "batch_size a number, such as 8"
        )


def _is_of_tokens(batch: Batch) -> bool:
    """True if all tensors of a batch are whole numbers, token ids among them."""
    tensors = [value for _, value in leaves(batch.data) if isinstance(value, Tensor)]
    return batch.positions is not None and not any(value.is_floating_point() for value in tensors)


def most_tokens(plan: Plan) -> int:
    """The size up to which batches are put together. More make no forward faster for each token, and the elements of a
    layer's input or output can still be numbered in 32 bits, as kernels of others may do."""
    return min(_MOST, _NUMBERED // max(max(target.shape) for target in plan.targets))
