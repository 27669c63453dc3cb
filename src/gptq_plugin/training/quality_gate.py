"""`QualityGate`: how far validation metrics may move from float to quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from gptq_plugin.errors import QualityError
from gptq_plugin.options import fields
from gptq_plugin.training.limit import Limit
from gptq_plugin.training.paired import FEWEST, Measured, Pairs, same_parts

ON_FAIL = ("raise", "warn", "escalate")


class QualityGate:
    """How much worse than the float model a quantized one may be.

    Args:
        max_degradation: Limits by the name of a logged metric, each as `Limit.parse` takes it; None sets none.
        on_fail: "raise" refuses a result that is not good enough, "warn" accepts it, "escalate" tries configurations
            that take more memory.
        max_bits: Average bits per weight they may take, scales and zeros included, g_idx not; None sets no limit.

    Raises:
        ValueError: `max_degradation` names no metrics, or a limit, `on_fail` or `max_bits` is out of range.
    """

    def __init__(
        self, max_degradation: Mapping[str, Any] | None, on_fail: str = "raise", max_bits: float | None = None
    ) -> None:
        fields.one_of(*ON_FAIL).check("on_fail", on_fail)
        fields.optional(fields.above(0), "no limit").check("max_bits", max_bits)
        self.limits = _limits(max_degradation)
        self.on_fail = on_fail
        self.max_bits = max_bits

    def check_names(self, logged: Iterable[str]) -> None:
        """Raises ValueError if a limit's metric is not among the logged ones, with those that are most like it."""
        known = set(logged)
        missing = [metric for metric in self.limits if metric not in known]
        if missing:
            near = dict.fromkeys(name for metric in missing for name in get_close_matches(metric, sorted(known), n=1))
            raise ValueError(
                f"max_degradation names {', '.join(missing)}, and validation logs "
                f"{', '.join(sorted(known)) or 'nothing'}" + (f": did you mean {', '.join(near)}?" if near else "")
            )

    def check_before(self, before: Mapping[str, float]) -> None:
        """Refuses metrics of the float model by which the quantized one cannot be judged.

        Raises:
            ValueError: As `check_names` and `check_parts`.
            QualityError: One is not finite, and that is not accepted (`on_fail` of "warn").
        """
        self.check_names(before)
        self.check_parts(before, before)
        broken = [f"{metric} is {before[metric]}" for metric in self.limits if not math.isfinite(before[metric])]
        if broken and self.on_fail != "warn":
            raise QualityError(
                f"{', '.join(broken)} of the float model, from which no change can be judged: look for a training that "
                "diverged, or broken validation samples. Nothing was quantized, and the module has its float weights"
            )

    @property
    def confident(self) -> list[str]:
        """The metrics whose limits ask for confidence."""
        return [metric for metric, limit in self.limits.items() if limit.confidence is not None]

    def check_parts(
        self, first: Mapping[str, float], second: Mapping[str, float], batches: float | None = None
    ) -> None:
        """Raises ValueError if a limit asks for confidence that there cannot be.

        Args:
            first, second: Metrics of the same model on the same data, of all names (`check_names`). If the parts they
                are measured on differ, so would those of the two models.
            batches: Number of batches in a whole validation, infinite if unknown; None if `first` is of a whole one.
        """
        for metric in self.confident:
            one, two = first[metric], second[metric]
            if not isinstance(one, Measured) or not isinstance(two, Measured):
                why = "it is no mean of values that are logged for each batch"
            elif not same_parts(one, two):
                why = "validation gives other batches each time: use a dataloader that neither shuffles nor augments"
            else:
                why = _too_few(Pairs.of(one, two), 1 if batches is None else batches / len(one.values))
            if not why:
                continue
            raise ValueError(
                f"max_degradation[{fields.shown(metric)}] asks for a confidence that cannot be had: {why}; or leave "
                "'at ...%' out"
            )

    def affords(self, bits: float) -> bool:
        """Returns whether weights may take that many bits on average."""
        return self.max_bits is None or bits <= self.max_bits

    def failures(self, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
        """Describes every limit that does not hold, a sentence each. A metric missing from `after` fails."""
        failed = []
        for metric, limit in self.limits.items():
            old, new = before[metric], after.get(metric, math.nan)
            if limit.excess(old, new) > 0:
                failed.append(f"{metric} went from {old:.5g} to {new:.5g} ({limit.described(old, new)})")
        return failed

    def is_worse(self, before: Mapping[str, float], than: Mapping[str, float], after: Mapping[str, float]) -> bool:
        """True if `after` is beyond a limit, and further than another model's metrics, `than`."""

        def excess(metric: str, values: Mapping[str, float]) -> float:
            return max(0.0, self.limits[metric].excess(before[metric], values.get(metric, math.nan)))

        return any(excess(metric, after) > excess(metric, than) for metric in self.limits)


def _too_few(pairs: Pairs, whole: float) -> str:
    """Why that many tell too little, if the whole data is so much larger than that of the pairs; empty if they do."""
    count = whole * len(pairs.before) / pairs.share
    if count >= FEWEST:
        return ""
    because = f" ({pairs.why})" if pairs.why else ""
    remedy = "make them smaller" if pairs.unit == "batches" else "take more"
    return f"there are {count:.0f} {pairs.unit}{because}, and fewer than {FEWEST} tell too little: {remedy}"


def _limits(max_degradation: Any) -> dict[str, Limit]:
    if max_degradation is None:
        return {}
    if not isinstance(max_degradation, Mapping):
        example = max_degradation if _is_limit(max_degradation) else 0.02
        raise ValueError(
            f"max_degradation names a logged metric for each limit, such as {{'val_loss': {fields.shown(example)}}}; "
            f"got {fields.shown(max_degradation)}"
        )
    for metric in max_degradation:
        if not isinstance(metric, str) or not metric:
            raise ValueError(
                f"max_degradation's keys are names of logged metrics, such as 'val_loss'; got {fields.shown(metric)}"
            )
    return {metric: Limit.parse(metric, value) for metric, value in max_degradation.items()}


def _is_limit(value: Any) -> bool:
    try:
        Limit.parse("", value)
    except ValueError:
        return False
    return True
