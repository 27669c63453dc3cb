"""Finds out by trial if batches that wait for each other compute something else than alone: `disturbed_layer`.

What forwards write at places that Python shows is exchanged (`kept_state`). What they keep elsewhere, in a C++ object
or on a stream, only shows in its effect.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gptq_plugin.walk.batch_thread import Forward, Waiting
from gptq_plugin.walk.kept_state import KeptState
from gptq_plugin.walk.kinds import kind_of
from gptq_plugin.walk.side_by_side import side_by_side

_NUMBERS = 1024  # of an input that are compared
_CALLS = 16  # at least, where there are as many
_TIMES = 10.0  # the differences of two runs alone, where kernels add in any order, that are no disturbance


def disturbed_layer(
    layers: Mapping[str, nn.Module], first: Forward, second: Forward, waiting: Waiting, state: KeptState
) -> str | None:
    """Runs two forwards in turns and one of them alone; returns the first layer whose input differs, if any.

    They run until layers of every kind so far have been called twice, which two blocks of a transformer do; layers
    whose names differ in numbers are of a kind.

    Args:
        layers: The layers by name; the forwards take turns at each call.
        first: The forward that is compared.
        second: The other one, of other data.
        waiting: As in `lockstep.walk`; the numbers are 0 and 1.
        state: As in `lockstep.walk`.
    """

    def inputs(*forwards: Forward) -> list[tuple[str, Tensor]]:
        return _inputs(layers, forwards, waiting, state)

    alone = inputs(first)
    differences = _differences(alone, inputs(first, second))
    if not any(off for _, off in differences):
        return None
    noise = max(off for _, off in _differences(alone, inputs(first)))
    return next((name for name, off in differences if off > _TIMES * noise), None)


def _inputs(
    layers: Mapping[str, nn.Module], forwards: Sequence[Forward], waiting: Waiting, state: KeptState
) -> list[tuple[str, Tensor]]:
    """The inputs of the first forward's calls, in order, [at most _NUMBERS] float32 each."""
    seen: list[tuple[str, Tensor]] = []
    kinds: Counter[str] = Counter()

    def visit(number: int, name: str, x: Tensor) -> None:
        if number == 0:
            kinds[kind_of(name)] += 1
            flat = x.detach().reshape(-1)
            seen.append((name, flat[:: max(1, len(flat) // _NUMBERS)][:_NUMBERS].float().clone()))

    def is_enough() -> bool:
        return len(seen) >= _CALLS and min(kinds.values()) > 1

    side_by_side(layers, dict(enumerate(forwards)), visit, waiting, state, is_enough)
    return seen


def _differences(one: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]) -> list[tuple[str, float]]:
    """By call its layer, and the norm of its inputs' difference to that of the input; infinity for another call."""
    found = []
    for (name, a), (also, b) in itertools.zip_longest(one, other, fillvalue=("", torch.empty(0, device="cpu"))):
        if name != also or a.shape != b.shape:
            off = torch.inf
        elif torch.equal(a.nan_to_num(), b.nan_to_num()):
            off = 0.0
        else:
            off = float((a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny))
        found.append((name or also, torch.inf if math.isnan(off) else off))
    return found
