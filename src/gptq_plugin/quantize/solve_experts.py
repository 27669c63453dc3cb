"""Solves experts together, divided among the ranks in chunks: `solve_experts`.

Tested by tests/quantize/test_experts_pass.py: as part of a pass; on several ranks by tests/ranks/test_same_bytes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_plugin import distributed
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.device.memory import with_room
from gptq_plugin.device.streams import AsyncRead
from gptq_plugin.gptq.solve_each import Solutions, most, solve_each
from gptq_plugin.walk.expert_hessians import Evidence


@dataclass(frozen=True)
class Chunk:
    """Experts that were solved together.

    Attributes:
        experts: Their numbers.
        evidence: Of each.
        solved: Their solutions, on every rank.
        damp_percents: Those used.
        good: Returns for each whether its solution is one; waits for the device.
    """

    experts: range
    evidence: list[Evidence]
    solved: Solutions
    damp_percents: list[float]
    good: Callable[[], list[bool]]


def solve_experts(
    weights: Callable[[int], Sequence[Tensor]],
    evidence: Iterator[Evidence],
    experts: int,
    shape: tuple[int, int],
    config: QuantizeConfig,
    make_room: Callable[[], bool] = lambda: False,
) -> Iterator[Chunk]:
    """Yields all experts in chunks; `solve_each` can solve the configuration. Collective.

    Chunks are the same for any number of ranks, which solve one at a time each and send it to the others.

    Args:
        weights: Returns the parts of an expert's weight, whose rows are one below the other.
        evidence: Of all experts.
        experts: Their number.
        shape: Of a weight.
        config: For all.
        make_room: As for `with_room`.
    """
    chunks = -(-experts // most(*shape))
    size, ranks, rank = -(-experts // chunks), distributed.world_size(), distributed.rank()
    numbers = [range(start, min(start + size, experts)) for start in range(0, experts, size)]
    for first in range(0, len(numbers), ranks):
        turn = [numbers[min(first + one, len(numbers) - 1)] for one in range(ranks)]
        mine: Callable[[], Solutions] | None = None
        told: dict[range, list[Evidence]] = {}
        for which in dict.fromkeys(turn):
            told[which] = [next(evidence) for _ in which]
            if turn[rank] == which:
                mine = _solver(weights, which, told[which], size, config)
        assert mine is not None
        solved = _on_all_ranks(with_room(mine, make_room), len(told), make_room)
        for which, of_rank in zip(told, solved, strict=True):
            damp_percents = [max(one.damp_percent, config.damp_percent) for one in told[which]]
            yield Chunk(which, told[which], of_rank, damp_percents, AsyncRead(of_rank.good).get)


def _solver(
    weights: Callable[[int], Sequence[Tensor]],
    experts: range,
    evidence: Sequence[Evidence],
    size: int,
    config: QuantizeConfig,
) -> Callable[[], Solutions]:
    """Solves some experts; the last one fills a chunk that has fewer, since sums may depend on their number."""
    damp_percents = [max(one.damp_percent, config.damp_percent) for one in evidence]
    means = [one.mean for one in evidence]
    fill = [len(experts) - 1] * (size - len(experts))
    chosen = [*range(len(experts)), *fill]

    def solve() -> Solutions:
        parts = [part for number in chosen for part in weights(experts[number])]
        stacked = torch.cat(parts).unflatten(0, (len(chosen), -1))
        hessians = torch.stack([means[number] for number in chosen])
        damping = torch.tensor([damp_percents[number] for number in chosen], dtype=torch.float64, device="cpu")
        return solve_each(stacked, hessians, config, damping.to(hessians.device))

    return solve


def _on_all_ranks(mine: Solutions, sharers: int, make_room: Callable[[], bool]) -> list[Solutions]:
    """The solutions of the first ranks, which have different ones."""
    if distributed.world_size() == 1:
        return [mine]
    fields = sorted(dataclasses.fields(mine), key=lambda field: -getattr(mine, field.name).element_size())
    values = [getattr(mine, field.name).contiguous() for field in fields]
    gathered = with_room(lambda: distributed.gather_rows(values, len(mine.good), sharers), make_room)
    names = [field.name for field in fields]
    return [Solutions(**dict(zip(names, of_rank, strict=True))) for of_rank in zip(*gathered, strict=True)]
