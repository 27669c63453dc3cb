"""Runs models on batches, plainly or in lock-step, and compares the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from maker import Batch
from torch import Tensor, nn

from gptq_plugin import QuantizeConfig
from gptq_plugin.calibration.forward import evaluating
from gptq_plugin.model.experts import learn_layouts
from gptq_plugin.model.plan import planned
from gptq_plugin.walk import lockstep
from gptq_plugin.walk.groups import find_groups


def outputs(model: nn.Module, batches: list[Batch], seed: int = 0) -> list[Tensor]:
    """All floating-point tensors of the batches' outputs."""
    with evaluating(model):
        return [t for batch in batches for t in _run(model, batch, seed)]


def walk(model: nn.Module, batches: list[Batch], config: QuantizeConfig) -> list[Tensor]:
    """`outputs` of batches that walk in lock-step and stop, without an action, at every layer to quantize."""
    found: dict[int, list[Tensor]] = {}

    def run(number: int) -> None:
        found[number] = _run(model, batches[number])

    forwards = [partial(run, number) for number in range(len(batches))]
    with evaluating(model):
        learn_layouts(model, forwards[0])
        with planned(model, config) as plan:
            modules = {target.name: target.module for target in plan.targets}
            groups = find_groups(modules, forwards[0])
            found.clear()
            for _ in lockstep.walk(groups, modules, forwards, lambda group, number, x: None):
                pass
    return [t for number in sorted(found) for t in found[number]]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """True if all bits are equal; NaN equals NaN."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other)
    )


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference as a fraction of the largest value."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return math.inf
    shares = [0.0]
    for a, b in zip(one, other):
        a, b = a.double(), b.double()
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return math.inf
        if finite.any():
            shares.append(float((a[finite] - b[finite]).abs().max() / b[finite].abs().max().clamp(min=1e-30)))
    return max(shares)


def _run(model: nn.Module, batch: Batch, seed: int = 0) -> list[Tensor]:
    """Runs a batch with a fixed seed: some models draw random numbers."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return [t.clone() for t in _floats(model(**batch))]


def _floats(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors of an output, except those of caches."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    for part in parts:
        yield from _floats(part)
