"""Seeded sources of cases: each is made from the seed and its number alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy


def randoms(first: int, count: int) -> Iterator[Random]:
    """A generator of random numbers for each case."""
    return (Random(f"{first}-{number}") for number in range(count))


def examples(strategies: Sequence[SearchStrategy[Any]], first: int, count: int) -> Iterator[Any]:
    """What Hypothesis generates, of each strategy in turn."""
    return (_example(strategies[number % len(strategies)], f"{first}-{number}") for number in range(count))


def _example(strategy: SearchStrategy[Any], source: str) -> Any:
    """The second example of a run: the first is always the simplest, and later ones are like those before."""
    found: list[Any] = []

    @seed(source)
    @settings(
        max_examples=2,
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found[-1]
