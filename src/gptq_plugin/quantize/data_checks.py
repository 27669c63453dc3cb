"""Checks of calibration data: enough of it, finite, and reaching the layers. All ranks make the same calls."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.device.finite import all_finite, not_finite_in
from gptq_plugin.errors import CalibrationError, TargetError, some
from gptq_plugin.model.plan import Plan

_DIVERGED = "Training diverged, or the checkpoint is damaged: quantize an earlier one (weights='best', or weights=PATH)"


@dataclass(frozen=True)
class Samples:
    """The calibration samples of all ranks.

    Attributes:
        count: Number of samples.
        sha256: Digest of their contents, in whatever order and on whichever ranks they are; see `batches.digest`.
        run_id: A random name for this quantization, the same on every rank.
    """

    count: int
    sha256: str
    run_id: str


def count_samples(calibration: Calibration) -> Samples:
    """Adds up the ranks' samples.

    Raises:
        CalibrationError: No rank has any.
    """
    own = calibration.samples, calibration.digest, uuid.uuid4().hex
    counts, digests, run_ids = zip(*distributed.gather_objects(own), strict=True)
    if not sum(counts):
        dropped = "; ".join(calibration.deviations)
        raise CalibrationError(f"the calibration set is empty{f': {dropped}' if dropped else ''}")
    return Samples(sum(counts), f"{sum(digests) % 2**256:064x}", run_ids[0])


def known_tokens(calibration: Calibration) -> int | None:
    """Number of tokens over all ranks, or None if a batch does not tell."""
    known = [batch.tokens for batch in calibration.batches]
    totals = distributed.gather_objects(None if None in known else sum(n for n in known if n is not None))
    return None if None in totals else sum(totals)


def check_enough(tokens: int, samples: int, plan: Plan) -> None:
    """Refuses fewer tokens than the narrowest layer has inputs.

    Raises:
        CalibrationError: There are fewer.
    """
    least, config = fewest_tokens(plan), plan.config
    if tokens >= least:
        return
    needed = math.ceil(least * samples / tokens) if tokens else 0
    raise CalibrationError(
        f"the calibration set is too short: {tokens} tokens in {samples} samples, while even the "
        f"narrowest layer has {least} inputs, so no Hessian would have full rank. Give more samples "
        f"(nsamples is {config.nsamples}{f', and {needed} like these are enough' if needed else ''}) or longer ones "
        f"(model_seqlen is {config.model_seqlen})"
        + (", or count all tokens: token_weighting is 'labels'" if config.token_weighting == "labels" else "")
    )


def fewest_tokens(plan: Plan) -> int:
    """The fewest tokens that a plan's layers can be calibrated on: the inputs of the narrowest."""
    return min(target.shape[1] for target in plan.targets)


def check_weight(layer: str, weight: Tensor) -> None:
    """Raises TargetError if a layer's weight holds NaN or infinity."""
    if not all_finite(weight):
        raise TargetError(f"{layer}: the weight holds NaN or infinity. {_DIVERGED}")


def check_finite(model: nn.Module) -> None:
    """Refuses a model whose weights hold NaN or infinity, whether they are quantized or not.

    Raises:
        TargetError: It names them.
    """
    broken = not_finite_in(model)
    if broken:
        raise TargetError(f"NaN or infinity in {some(broken)} of {type(model).__name__}. {_DIVERGED}")


def not_finite(model: nn.Module, layer: str, where: str) -> CalibrationError:
    """The error for a layer whose input holds NaN or infinity."""
    broken = not_finite_in(model)
    if broken:
        return CalibrationError(
            f"the input of {layer} holds NaN or infinity, since {some(broken)} of the model does. {_DIVERGED}"
        )
    return CalibrationError(
        f"the input of {layer} holds NaN or infinity in {where}. Look for broken samples, or run the model in a wider "
        "dtype: float16 overflows at 65504"
    )


def not_finite_on_ranks(model: nn.Module, layer: str, batches: Sequence[int]) -> CalibrationError:
    """`not_finite`, naming every rank's batches; every rank gives the numbers of its own."""
    of_all = distributed.gather_objects(list(batches))
    where = [f"calibration batches {one} (rank {rank})" for rank, one in enumerate(of_all) if one]
    return not_finite(model, layer, ", ".join(where) or "the sum over all batches")


def check_some_left(left_float: Mapping[str, str], plan: Plan) -> None:
    """Refuses a model of which no layer computes what a quantized one does.

    Args:
        left_float: Why layers have to stay float, by name.
        plan: The layers.

    Raises:
        TargetError: There is none.
    """
    if all(target.name in left_float for target in plan.targets):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_float.items())[:5])
        raise TargetError(f"no layer is left to quantize: {reasons}")


def unreached(plan: Plan) -> CalibrationError:
    """The error for a calibration that called none of the layers."""
    return CalibrationError(
        f"no calibration batch reached any of the {len(plan.targets)} layers to quantize, such as "
        f"{plan.targets[0].name}: the forward runs other modules than {type(plan.model).__name__}'s"
    )
