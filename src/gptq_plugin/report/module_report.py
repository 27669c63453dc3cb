"""The report of one layer: `ModuleReport`.

Tested by tests/report/test_report.py: with the report of a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleReport:
    """One linear layer.

    Attributes:
        name: Full dotted name.
        method: "gptq", "rtn" (round-to-nearest) or "float" (not quantized).
        bits: Width of its codes; None if float.
        group_size: Channels per group, or -1; None if float.
        shape: (out_features, in_features).
        loss: Mean over tokens of the squared output error, summed over outputs; NaN if unknown.
        rtn_loss: The same for round-to-nearest.
        tokens: Calibration tokens in its Hessian, over all ranks.
        damp_percent: The damping used.
        seconds: Time to solve it; layers solved together share it in proportion to their rows.
        max_input: Largest absolute input in calibration, at any position, over all ranks; NaN if unknown.
        max_output: The same of the quantized layer's output.
        places: Number of times that an export stores it; above 1 for one of a replicated block.
        stored_bytes: Bytes of its codes, scales and zeros (`checkpoint.sizes.stored_bytes`) in all places; 0 if float.
        output_power: Mean over tokens of the squared output of the float weight, summed over outputs, without bias; NaN
            if unknown.
        reason: Why it is float.
        deviations: A sentence for each difference from the request.
    """

    name: str
    method: str
    bits: int | None
    group_size: int | None
    shape: tuple[int, int]
    loss: float = math.nan
    rtn_loss: float = math.nan
    tokens: int = 0
    damp_percent: float = math.nan
    seconds: float = 0.0
    max_input: float = math.nan
    max_output: float = math.nan
    places: int = 1
    stored_bytes: int = 0
    output_power: float = math.nan
    reason: str = ""
    deviations: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of its weights in an export, in all places."""
        return self.places * self.shape[0] * self.shape[1]

    @property
    def relative_error(self) -> float:
        """`loss` as a share of `output_power`, by which layers compare; NaN if unknown."""
        return self.loss / self.output_power if self.output_power > 0 else math.nan

    @property
    def rtn_relative_error(self) -> float:
        """The same of `rtn_loss`."""
        return self.rtn_loss / self.output_power if self.output_power > 0 else math.nan

    @property
    def largest(self) -> float:
        """The larger of `max_input` and `max_output`; NaN if neither is known."""
        return max((x for x in (self.max_input, self.max_output) if not math.isnan(x)), default=math.nan)
