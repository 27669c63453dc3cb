"""How a metric of a report was measured, where a benchmark gave it: `Benchmark`.

Tested by tests/apps/test_benchmarks.py: with the harness that measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A task of an evaluation harness, and one of its metrics.

    Attributes:
        task: The task's name.
        metric: The metric's.
        harness: Name and version.
        version: The task's version, as text; empty if unknown.
        dataset: Its data's id on the hub; empty if it has none.
        samples: Number of samples, of all that the task has.
        shots: Examples before each; -1 if unknown.
        chat: True if the tokenizer's chat template was applied.
        error: Standard error of the quantized model's value; NaN if unknown.
    """

    task: str
    metric: str
    harness: str
    version: str = ""
    dataset: str = ""
    samples: int = 0
    shots: int = -1
    chat: bool = False
    error: float = math.nan
