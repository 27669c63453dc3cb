"""The parameters of a model that stay float, and why: logged before the work, since "4 bits" may be mostly 16."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_plugin.device.modules import modules_of
from gptq_plugin.errors import some
from gptq_plugin.model.experts import expert_layouts, tied_parameters
from gptq_plugin.model.plan import Plan
from gptq_plugin.report import numbers

_LARGE = 0.01  # share of the model's bytes from which a parameter is named
_MOSTLY = 0.5  # share of the export's bytes


@dataclass(frozen=True)
class FloatWeight:
    """A parameter that is not quantized.

    Attributes:
        name: Full dotted name.
        shape: Its shape.
        bytes: Its size in bytes.
        reason: Why it stays float.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The division of a model's parameters into quantized and float ones.

    Attributes:
        floats: The float ones, the largest first.
        quantized: Bytes of the weights to quantize, while they are float; without one that stays float in another
            place, such as an embedding whose output layer is quantized.
        packed: Bytes of their codes, scales and zeros in the export.
    """

    floats: Sequence[FloatWeight]
    quantized: int
    packed: int

    @classmethod
    def of(cls, plan: Plan, packed: int) -> Coverage:
        """The coverage of a planned quantization, while the model's experts are apart.

        Args:
            plan: The layers to quantize and to leave float.
            packed: Bytes of the targets' codes, scales and zeros in the export.
        """
        found = _float_weights(plan)
        quantized = (target.parameter for target in plan.targets)
        lost = sum(parameter.nbytes for parameter in quantized if id(parameter) not in found)
        return cls(sorted(found.values(), key=lambda one: -one.bytes), lost, packed)

    @property
    def share(self) -> float:
        """Share of the model's bytes that stays float."""
        return self._float / max(1, self.float_model)

    @property
    def exported_share(self) -> float:
        """Share of the export's bytes that is float, biases included and g_idx left out."""
        return self._float / max(1, self.exported_bytes)

    @property
    def exported_bytes(self) -> int:
        """Bytes of the export's parameters, g_idx left out."""
        return self._float + self.packed

    @property
    def float_model(self) -> int:
        """Bytes of the model's parameters before."""
        return self._float + self.quantized

    @property
    def mostly_float(self) -> bool:
        """True if more than half of the export's bytes are float."""
        return self.exported_share > _MOSTLY

    def summary(self) -> str:
        """A sentence with the shares, the reasons and the large parameters."""
        total = max(1, self.float_model)
        parts = []
        for reason, size, ones in self.by_reason():
            large = [f"{one.name} {list(one.shape)}" for one in ones if one.bytes >= _LARGE * total]
            what = f" ({some(large)})" if large else ""
            parts.append(f"{numbers.format_bytes(size)}, {size / total:.1%}: {reason}{what}")
        return (
            f"{self.share:.1%} of the model's {numbers.format_bytes(total)} stay float, which will be "
            f"{self.exported_share:.1%} of the export: " + "; ".join(parts)
        )

    def by_reason(self) -> list[tuple[str, int, list[FloatWeight]]]:
        """Each reason with the bytes and the parameters it concerns, the largest first."""
        ones: dict[str, list[FloatWeight]] = defaultdict(list)
        for one in self.floats:
            ones[one.reason].append(one)
        sizes = {reason: sum(one.bytes for one in members) for reason, members in ones.items()}
        return [(reason, sizes[reason], ones[reason]) for reason in sorted(ones, key=lambda reason: -sizes[reason])]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "share_float": self.share,
            "share_float_of_export": self.exported_share,
            "quantized_bytes": self.quantized,
            "packed_bytes": self.packed,
            "floats": [dataclasses.asdict(one) for one in self.floats],
        }

    @property
    def _float(self) -> int:
        return sum(one.bytes for one in self.floats)


def _float_weights(plan: Plan) -> dict[int, FloatWeight]:
    """Every parameter in a place where it is not quantized, by its id."""
    reasons = {skip.module: skip.reason for skip in plan.skipped}
    quantized = {target.module for target in plan.targets}
    tied = tied_parameters(plan.model)
    found: dict[int, FloatWeight] = {}
    for module_name, module in modules_of(plan.model).items():
        for parameter_name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in found or (parameter_name == "weight" and module in quantized):
                continue
            reason = reasons.get(module) if parameter.dim() > 1 else None
            if reason is None and id(parameter) in tied and expert_layouts(module, parameter_name):
                reason = f"matrices of {type(module).__name__}, which several modules share"
            name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            reason = reason or _reason(module, parameter_name, parameter)
            found[id(parameter)] = FloatWeight(name, tuple(parameter.shape), parameter.nbytes, reason)
    return found


def _reason(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    kind = type(module).__name__
    if parameter.dim() < 2:
        return "norms, biases and other vectors"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    if isinstance(module, nn.Linear):
        return f"layers of class {kind}, which does not compute what Linear does"
    layouts = expert_layouts(module, name)
    if layouts is not None:
        return (
            f"matrices of {kind}, whose layout is unknown before calibration"
            if layouts
            else f"matrices of {kind}, which are not used as one expert's each"
        )
    return f"parameters of {kind}, which is not a Linear"
