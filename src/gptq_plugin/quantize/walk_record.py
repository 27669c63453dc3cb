"""What a walk shows beside the layers' Hessians: `WalkRecord`.

Tested by tests/quantize/test_kept_pass.py: in reports of passes that did not walk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WalkRecord:
    """Facts of the batches of all ranks, for the report.

    Attributes:
        ranges: By layer, its largest input and output.
        remarks: By layer, sentences on its inputs.
        late: By layer, calls that came after it was solved.
        notes: By remark, the number of batches.
        positions: See `QuantizeReport`.
    """

    ranges: Mapping[str, tuple[float, float]]
    remarks: Mapping[str, tuple[str, ...]]
    late: Mapping[str, int]
    notes: Mapping[str, int]
    positions: Mapping[str, str]

    def to_facts(self) -> dict[str, Any]:
        """As plain values."""
        return {name: dict(value) for name, value in vars(self).items()}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> WalkRecord:
        """The inverse of `to_facts`."""
        pairs = {name: (low, high) for name, (low, high) in facts["ranges"].items()}
        remarks = {name: tuple(one) for name, one in facts["remarks"].items()}
        return cls(**{**facts, "ranges": pairs, "remarks": remarks})
