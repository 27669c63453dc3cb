"""The methods of quantization: each is a set of values for fields of the configuration.

Tested by tests/test_config.py: as fields of a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By method, the values of its fields where they are None.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "gptq": {
        "damp_percent": 0.01,
        "clip_ratios": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
        "clip_candidates": 2,
        "scale_rounds": 0,
        "refit_rounds": 0,
        "asymmetric_alpha": 0.0,
    },
    "best": {
        "damp_percent": 0.1,
        "clip_ratios": (1.1, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45),
        "clip_candidates": 1,
        "scale_rounds": 2,
        "refit_rounds": 3,
        "asymmetric_alpha": 0.5,
    },
}
METHOD_FIELDS = tuple(METHODS["gptq"])
