"""Seeded sources of cases."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

_BLOCK = 100  # what Hypothesis generates depends on how much it is asked for

_Value = TypeVar("_Value")


def randoms(seed: int, count: int) -> Iterator[Random]:
    """A generator of random numbers for each case."""
    return (Random(f"{seed}-{number}") for number in range(count))


def examples(strategy: SearchStrategy[_Value], first: int, count: int) -> Iterator[_Value]:
    """What Hypothesis generates with this seed; it shrinks nothing and keeps nothing."""
    for start in range(0, count, _BLOCK):
        found: list[_Value] = []

        @seed(f"{first}-{start}")
        @settings(
            max_examples=_BLOCK,
            phases=(Phase.generate,),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def collect(value: _Value) -> None:
            found.append(value)  # noqa: B023  it is called in this turn of the loop

        collect()
        yield from found[: count - start]
