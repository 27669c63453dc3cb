"""Fixtures of these tests."""

from __future__ import annotations

import pytest

from gptq_plugin.gptq.solver import solve
from gptq_plugin.quantize import one_pass as passes


@pytest.fixture
def solved(monkeypatch):
    """What the solver was given, call by call."""
    calls = []

    def solve_shared(weight, hessian, config, drift=None, **_):
        calls.append((tuple(weight.shape), hessian.clone(), None if drift is None else drift.clone()))
        return solve(weight, hessian, config, drift)

    monkeypatch.setattr(passes, "solve_shared", solve_shared)
    return calls
