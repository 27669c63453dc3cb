"""Is it good enough? `QualityGate` compares a metric before and after, and says which layers to give more bits."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.config import BITS, QuantizeConfig

ON_FAIL = ("raise", "warn", "escalate")
_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the layers that get more bits, round by round


@dataclass(frozen=True)
class Limit:
    """How far one metric may move.

    Attributes:
        amount: The largest change that is still good, with the sign of the direction that is worse.
        relative: Whether it is a share of the float model's value.
    """

    amount: float
    relative: bool

    @classmethod
    def parse(cls, metric: str, value: Any) -> Limit:
        """From 0.02 (absolute: the metric may rise by that), -0.01 (may fall) or "2%", "-1%" (relative)."""
        relative = isinstance(value, str) and value.strip().endswith("%")
        try:
            amount = float(value.strip().removesuffix("%")) / 100 if relative else float(value)
        except (TypeError, ValueError):
            amount = math.nan
        if not math.isfinite(amount) or amount == 0 or isinstance(value, bool):
            raise ValueError(
                f"max_degradation[{metric!r}] must be a number or a percentage other than zero, such as 0.02 or '2%' "
                f"for a metric that may rise by so much, -0.01 for one that may fall; got {value!r}"
            )
        return cls(amount, relative)

    def excess(self, before: float, after: float) -> float:
        """By how much the change is worse than allowed; not above zero when it is good. NaN is never good."""
        allowed = abs(self.amount) * (abs(before) if self.relative else 1)
        excess = math.copysign(1, self.amount) * (after - before) - allowed
        return math.inf if math.isnan(excess) else excess


class QualityGate:
    """How much worse than the float model a quantized one may be.

    Args:
        max_degradation: By the name of a logged metric, what `Limit.parse` takes.
        on_fail: "raise" refuses the result, "warn" takes it, "escalate" gives layers more bits until it is good.
        max_bits: With "escalate", the average bits a weight that may not be exceeded.

    Raises:
        ValueError: A limit, `on_fail` or `max_bits` makes no sense.
    """

    def __init__(self, max_degradation: Mapping[str, Any], on_fail: str = "raise", max_bits: float = 8.0) -> None:
        if on_fail not in ON_FAIL:
            raise ValueError(f"on_fail must be one of {', '.join(ON_FAIL)}, got {on_fail!r}")
        if not 0 < max_bits <= max(BITS):
            raise ValueError(f"max_bits must be above 0 and at most {max(BITS)}, got {max_bits!r}")
        self.limits = {metric: Limit.parse(metric, value) for metric, value in max_degradation.items()}
        self.on_fail = on_fail
        self.max_bits = max_bits

    def check_names(self, logged: Iterable[str]) -> None:
        """Raises ValueError when validation logs no metric of a limit's name."""
        known = set(logged)
        missing = [metric for metric in self.limits if metric not in known]
        if missing:
            raise ValueError(
                f"max_degradation names {', '.join(missing)}, and validation logs "
                f"{', '.join(sorted(known)) or 'nothing'}"
            )

    def failures(self, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
        """A sentence for every limit that does not hold."""
        said = []
        for metric, limit in self.limits.items():
            old, new = before[metric], after[metric]
            if limit.excess(old, new) > 0:
                allowed = f"{limit.amount:+.3%}" if limit.relative else f"{limit.amount:+.5g}"
                change = f"{new - old:+.5g}" + (f", {(new - old) / abs(old):+.3%}" if old else "")
                said.append(f"{metric} went from {old:.5g} to {new:.5g} ({change}; {allowed} allowed)")
        return said


@dataclass
class Escalation:
    """Configurations with ever more bits for the layers that need them most.

    Every round raises a larger share of the layers, the noisiest first, to the next width; when all have it, the
    width after that begins. Mixed widths are read by this package, GPTQModel and vLLM, not by transformers.

    Attributes:
        config: The first configuration.
        sizes: Weights of each layer.
        noise: By layer, the relative error of its output at the width it began with.
        max_bits: Average bits a weight that may not be exceeded.
    """

    config: QuantizeConfig
    sizes: Mapping[str, int]
    noise: Mapping[str, float]
    max_bits: float

    def rounds(self) -> Iterator[tuple[QuantizeConfig, str]]:
        """The configurations, cheapest first, and what each does."""
        ranked = sorted(self.noise, key=lambda name: self.noise[name], reverse=True)
        bits = {name: self._bits(name) for name in ranked}
        while narrow := [name for name in ranked if bits[name] < BITS[-1]]:
            wider = {name: min(b for b in BITS if b > bits[name]) for name in narrow}
            for count in sorted({math.ceil(share * len(narrow)) for share in _SHARES}):
                now = {**bits, **{name: wider[name] for name in narrow[:count]}}
                average = sum(now[name] * self.sizes[name] for name in now) / sum(self.sizes[name] for name in now)
                if average > self.max_bits:
                    return
                raised = sum(now[name] != self._bits(name) for name in now)
                yield self._with_bits(now), f"{raised} of {len(now)} layers with more bits, {average:.2f} on average"
            bits = now

    def _bits(self, name: str) -> int:
        resolved = self.config.for_module(name)
        assert resolved is not None
        return resolved.bits

    def _with_bits(self, bits: Mapping[str, int]) -> QuantizeConfig:
        """Rules for single layers come first: the first rule that matches a name counts."""
        own = {}
        for name, width in bits.items():
            _, rule = self.config.rule_for(name)
            if width != self._bits(name):
                own[f"{re.escape(name)}$"] = {**rule, "bits": width}
        others = {pattern: rule for pattern, rule in self.config.dynamic.items() if pattern not in own}
        return dataclasses.replace(self.config, dynamic={**own, **others})


@torch.no_grad()
def output_noise(
    model: nn.Module, floats: Mapping[str, nn.Module], batches: Sequence[Callable[[], Any]]
) -> dict[str, float]:
    """How wrong the outputs of quantized layers are, on the inputs they get: Σ‖x(W − Q)ᵀ‖² / Σ‖xWᵀ‖².

    Args:
        model: The quantized model.
        floats: By name, the float layers that its quantized ones replaced.
        batches: Each runs a batch through the model when called.

    Returns:
        By layer, over all ranks; 0 for one that no batch reached.
    """
    wrong = dict.fromkeys(floats, 0.0)
    whole = dict.fromkeys(floats, 0.0)

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            wanted = floats[name](args[0]).float()
            wrong[name] += float((wanted - output.float()).square().sum())
            whole[name] += float(wanted.square().sum())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(compare(name)) for name in floats]
    try:
        for run in batches:
            run()
    finally:
        for handle in handles:
            handle.remove()
    ranks = distributed.gather_objects((wrong, whole))
    total = [{name: sum(one[part][name] for one in ranks) for name in floats} for part in (0, 1)]
    return {name: total[0][name] / total[1][name] if total[1][name] else 0.0 for name in floats}
